"""The ranges that an NVTX tool receives, and that tracing costs nothing when it is off."""

from __future__ import annotations

import subprocess
import sys
import timeit
from pathlib import Path

import pytest
import torch

import fused_elbo
from fused_elbo import tracing

from .ranges import Range, build_tool, parse, run_under_tool

# One process for all scenarios: importing torch costs more than running them.
SCRIPT = """
import threading, torch, fused_elbo
from fused_elbo import tracing, DiagonalGaussian

backend = fused_elbo.explain(torch.empty(0)).split(":")[0]
print(backend)

def leaf(*shape):
    return torch.randn(shape, requires_grad=True)

def step(rows=8):
    with tracing.range("forward"):
        mean, logvar, moments, recon, x = (
            leaf(rows, 4), leaf(rows, 4), leaf(rows, 6, 2, 2), leaf(rows, 10), torch.randn(rows, 10)
        )
        z, kl = fused_elbo.reparameterize_kl(mean, logvar)
        zk = fused_elbo.reparameterize(mean, logvar, num_samples=3)
        z4, kl4 = DiagonalGaussian.from_moments(moments).sample_kl()
        ll = fused_elbo.gaussian_log_likelihood(x, recon)
        loss = fused_elbo.elbo_loss(recon, x, mean, logvar).loss
        total = z.sum() + zk.sum() + kl.sum() + z4.sum() + kl4.sum() + ll.sum() + loss
    with tracing.range("backward"):
        total.backward()

with tracing.range("step"):
    step()

with tracing.range("exception"):
    try:
        with tracing.range("inner"):
            raise KeyError
    except KeyError:
        pass
    from fused_elbo import backends
    try:
        backends.select("cpu", None).latent_forward(torch.randn(2, 3), *[None] * 4, *["wrong"] * 9)
    except Exception:
        pass
    else:
        raise AssertionError("that call was to fail")

threads = [threading.Thread(target=lambda: [step(16) for _ in range(20)]) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join()

# As the first call of the compiled function, and without a graph break.
def compiled_step(mean, logvar, recon, x):
    with tracing.range("not traced"):
        z, kl = fused_elbo.reparameterize_kl(mean, logvar)
        ll = fused_elbo.gaussian_log_likelihood(x, recon)
    return fused_elbo.elbo_loss(recon, x, mean, logvar).loss + z.sum() + kl.sum() + ll.sum()

compiled = torch.compile(compiled_step, fullgraph=True, backend="aot_eager")
inputs = leaf(8, 4), leaf(8, 4), leaf(8, 10), torch.randn(8, 10)
with tracing.range("compiled"):
    compiled(*inputs).backward()

tracing.disable()
with tracing.range("disabled"):
    step()
    compiled(*inputs).backward()
with tracing.enable(), tracing.range("enabled again"):
    fused_elbo.gaussian_kl(leaf(8, 4), leaf(8, 4))
fused_elbo.gaussian_kl(leaf(8, 4), leaf(8, 4))

with tracing.enable(), tracing.range("switched off within"):
    tracing.disable()

import nvtx
early = tracing._EarlyDomain(nvtx)
early.push_range(early.get_event_attributes(message="early nvtx", color=255, payload=3))
early.pop_range()
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[Range]]]:
    """The backend that ran, and the ranges of each thread, the main one first."""
    folder = tmp_path_factory.mktemp("nvtx")
    log = folder / "log"
    backend = run_under_tool(build_tool(folder), log, SCRIPT).strip()
    return backend, parse(log)


@pytest.fixture(scope="module")
def main_thread(traced: tuple[str, dict[str, list[Range]]]) -> dict[str, Range]:
    return {r.message: r for r in next(iter(traced[1].values()))}


def test_every_operation_has_one_range_forward_and_one_backward(
    main_thread: dict[str, Range],
) -> None:
    step = main_thread["step"]
    forward, backward = step.children
    assert (forward.message, backward.message) == ("forward", "backward")
    assert [r.name for r in forward.children] == [
        *["latent_forward"] * 3,
        "likelihood_forward",
        "elbo_forward",
    ]
    assert sorted(r.name for r in backward.children) == [
        "elbo_backward",
        *["latent_backward"] * 3,
        "likelihood_backward",
    ]
    assert all(not r.children for r in forward.children + backward.children)


def test_ranges_name_backend_dtype_and_shape(
    traced: tuple[str, dict[str, list[Range]]], main_thread: dict[str, Range]
) -> None:
    backend = traced[0]
    forward, backward = main_thread["step"].children
    assert [r.message for r in forward.children] == [
        f"latent_forward {backend} float32 [8, 4]",
        f"latent_forward {backend} float32 [8, 4] K=3",
        f"latent_forward {backend} float32 [8, 6, 2, 2]",
        f"likelihood_forward {backend} float32 [8, 10]",
        f"elbo_forward {backend} float32 [8, 10]",
    ]
    assert [r.payload for r in forward.children] == [32, 32, 192, 80, 80]
    assert {r.message for r in backward.children} >= {
        f"latent_backward {backend} float32 [8, 4] K=3"
    }


def test_everything_is_in_the_domain_of_the_package(
    traced: tuple[str, dict[str, list[Range]]],
) -> None:
    everything = [r for roots in traced[1].values() for root in roots for r in root.walk()]
    assert everything and {r.domain for r in everything} == {"fused_elbo"}


def test_an_exception_closes_its_ranges(main_thread: dict[str, Range]) -> None:
    inner, failed = main_thread["exception"].children  # that they were popped, parse() has checked
    assert inner.message == "inner" and not inner.children
    assert failed.name == "latent_forward" and not failed.children


def test_threads_keep_their_ranges_apart(traced: tuple[str, dict[str, list[Range]]]) -> None:
    _, first, second = traced[1].values()
    for roots in (first, second):
        assert [r.message for r in roots] == ["forward", "backward"] * 20
        assert {r.name for root in roots for r in root.children} == {
            f"{op}_{way}"
            for op in ("latent", "likelihood", "elbo")
            for way in ("forward", "backward")
        }
        assert all("[16, " in r.message for root in roots for r in root.children)


def test_a_compiled_graph_has_the_ranges_of_its_kernels(main_thread: dict[str, Range]) -> None:
    # The backward pass of elbo_loss is a multiplication, which the compiler fuses with others.
    assert sorted(r.name for r in main_thread["compiled"].children) == [
        "elbo_forward",
        "latent_backward",
        "latent_forward",
        "likelihood_backward",
        "likelihood_forward",
    ]


def test_switched_off_nothing_is_emitted(main_thread: dict[str, Range]) -> None:
    assert "disabled" not in main_thread
    assert [r.name for r in main_thread["enabled again"].children] == ["latent_forward"]
    assert list(main_thread) == [
        *("step", "exception", "compiled", "enabled again", "switched off within", "early nvtx")
    ]


def test_early_versions_of_nvtx_get_the_same_ranges(main_thread: dict[str, Range]) -> None:
    early = main_thread["early nvtx"]
    assert (early.domain, early.payload) == ("fused_elbo", 3)


def test_ranges_are_seen_by_torch_profiler() -> None:
    mean = torch.randn(8, 4, requires_grad=True)
    with tracing.enable(), torch.profiler.profile() as profiler, tracing.range("mine"):
        fused_elbo.gaussian_kl(mean, mean * 0.5).sum().backward()
    names = [
        event.name.split(" ")[1]
        for event in profiler.events()
        if event.name.startswith("fused_elbo: ")
    ]
    assert names == ["mine", "latent_forward", "latent_backward"]


def test_switched_off_the_kernels_themselves_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_elbo import backends

    assert not tracing.is_enabled()
    plain = backends.select("cpu", None)
    with tracing.enable():
        assert backends.select("cpu", None) is not plain
    assert backends.select("cpu", None) is plain


def test_a_range_costs_under_a_tenth_of_a_microsecond_when_off() -> None:
    off = tracing.range("x")
    assert off is tracing.range("y")  # nothing is made
    # A quarter of a millisecond each: some of them are left alone on a busy machine.
    calls, windows = 1000, 200
    best = min(timeit.repeat(lambda: tracing.range("x"), number=calls, repeat=windows)) / calls
    empty = min(timeit.repeat(lambda: None, number=calls, repeat=windows)) / calls
    # Twice the promise: a shared machine slows both down.
    assert best - empty < 0.2e-6


def test_import_brings_in_neither_nvtx_nor_dynamo_nor_triton() -> None:
    unwanted = {"nvtx", "triton", "torch._dynamo"}
    script = f"import sys, torch, fused_elbo; print(sys.modules.keys() & {unwanted})"
    root = Path(fused_elbo.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_results_are_the_same_with_ranges() -> None:
    key = fused_elbo.NoiseKey(7)
    results = []
    for _ in range(2):
        mean = torch.linspace(-2, 2, 24).view(4, 6).requires_grad_()
        z, kl = fused_elbo.reparameterize_kl(mean, mean * 0.3, key=key)
        out = fused_elbo.elbo_loss(z, torch.zeros_like(z), kl=kl, recon_logvar=-0.5)
        (grad,) = torch.autograd.grad(out.loss, mean)
        results.append((z, kl, out.loss, grad))
        tracing.enable()
    tracing.disable()
    for plain, ranged in zip(*results):
        assert torch.equal(plain, ranged)


TRAINER = """
import torch, fused_elbo
from fused_elbo import tracing
from fused_vae.config import TrainConfig
from fused_vae.data import Images
from fused_vae.train import Trainer

images = Images("noise", torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), 256)
trainer = Trainer(TrainConfig(latent=4, epochs=1, batch_size=6).resolved(images), images, images)
for epoch in trainer.epochs():
    for _ in epoch:
        pass
"""


def test_a_training_step_has_its_stages_with_the_operations_inside(tmp_path: Path) -> None:
    run_under_tool(build_tool(tmp_path), tmp_path / "log", TRAINER)
    (roots,) = parse(tmp_path / "log").values()
    stages = ["data", "encoder", "latent", "decoder", "likelihood", "backward", "optimizer"]
    assert [r.message for r in roots[:14]] == stages * 2
    step = {r.message: [c.name for c in r.children] for r in roots[:7]}
    assert step["latent"] == ["latent_forward"]
    assert step["likelihood"] == ["elbo_forward"]
    assert sorted(step["backward"]) == ["elbo_backward", "latent_backward"]
    assert not step["data"] + step["encoder"] + step["decoder"] + step["optimizer"]
