"""The fast path: the same results as the Python it stands for, and no call that it should leave."""

from __future__ import annotations

import gc
import importlib
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fused_elbo
from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    fastpath,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)

pytestmark = pytest.mark.skipif(
    fastpath.reason() is not None, reason=f"no fast path here: {fastpath.reason()}"
)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with fused_elbo.use_backend("cpu"):
        reparameterize(torch.zeros(1, 1), torch.zeros(1, 1))  # loads the extension
        yield


@contextmanager
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything inside runs without the fast path."""
    with monkeypatch.context() as patched:
        for name in fastpath._FUNCTIONS:
            patched.setattr(fastpath, name, fastpath._not_here)
        yield


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [each.to(dtype).requires_grad_() for each in made]


EVENT = (6, 3, 5)
CALLS: dict[str, Callable[[list[Tensor]], object]] = {
    "reparameterize_kl": lambda t: reparameterize_kl(t[0], t[1]),
    "reparameterize_kl, prior": lambda t: reparameterize_kl(*t[:4]),
    "reparameterize_kl, none": lambda t: reparameterize_kl(t[0], t[1], reduction="none"),
    "reparameterize_kl, batchmean": lambda t: reparameterize_kl(*t[:4], reduction="batchmean"),
    "reparameterize": lambda t: reparameterize(t[0], t[1]),
    "gaussian_kl": lambda t: gaussian_kl(t[0], t[1], reduction="sum"),
    "gaussian_kl, prior": lambda t: gaussian_kl(*t[:4]),
    "samples, key": lambda t: reparameterize_kl(t[0], t[1], num_samples=3, key=NoiseKey(7, 2, 5)),
    "key in a tensor": lambda t: reparameterize_kl(t[0], t[1], key=NoiseKey(torch.tensor(9))),
    "logstd, prior": lambda t: reparameterize_kl(*t[:4], param="logstd"),
    "mask": lambda t: reparameterize_kl(t[0], t[1], mask=t[2].detach() > 0),
    "moments": lambda t: DiagonalGaussian.from_moments(torch.cat(t[:2], 1)).sample_kl(),
    "moments, KL": lambda t: DiagonalGaussian.from_moments(torch.cat(t[:2], 1)).kl(),
    "moments, z": lambda t: DiagonalGaussian.from_moments(torch.cat(t[:2], 2), 2, None).rsample(),
    "moments, none": lambda t: DiagonalGaussian(t[0], t[1]).sample_kl(reduction="none"),
    "moments, channels last": lambda t: DiagonalGaussian.from_moments(
        torch.cat(t[:2], 1)[..., None].to(memory_format=torch.channels_last), clamp=(-0.5, 0.5)
    ).sample_kl(),
    "moments, logstd": lambda t: DiagonalGaussian(t[0], t[1], "logstd").sample_kl(),
    "likelihood": lambda t: gaussian_log_likelihood(t[0], t[1]),
    "likelihood, number": lambda t: gaussian_log_likelihood(t[0], t[1], -1.5, reduction="sum"),
    "likelihood, scalar": lambda t: gaussian_log_likelihood(t[0], t[1], t[5]),
    "likelihood, full": lambda t: gaussian_log_likelihood(*t[:3], reduction="none"),
    "likelihood, channel": lambda t: gaussian_log_likelihood(t[0], t[1], t[4]),
    "likelihood, mask": lambda t: gaussian_log_likelihood(t[0], t[1], mask=t[2].detach() > 0),
    "elbo": lambda t: elbo_loss(*t[:4]),
    "elbo, beta": lambda t: elbo_loss(*t[:4], beta=4, reduction="sum"),
    "elbo, per sample": lambda t: elbo_loss(*t[:4], recon_logvar=t[5], reduction="sample"),
    "elbo, full": lambda t: elbo_loss(t[0], t[1], kl=t[6], recon_logvar=t[2]),
    "elbo, tensor beta": lambda t: elbo_loss(*t[:4], beta=torch.tensor(0.5)),
}


def run(call: Callable[[list[Tensor]], object], inputs: list[Tensor]) -> list[Tensor | None]:
    """Outputs, and gradients of a weighted sum of those that have one."""
    torch.manual_seed(3)
    outputs = call(inputs)
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
    total = sum(
        (each.double() * torch.linspace(0.5, 2, each.numel()).view(each.shape)).sum()
        for each in found
        if each.requires_grad
    )
    return [*found, *torch.autograd.grad(total, inputs, allow_unused=True)]


@pytest.fixture(params=["directly", "by the dispatcher"])
def called(request: pytest.FixtureRequest) -> Iterator[None]:
    """How operations are called: on a GPU always by the dispatcher."""
    compiled = importlib.import_module("fused_elbo._fastpath")
    compiled.set_direct_calls(request.param == "directly")
    yield
    compiled.set_direct_calls(True)


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_bitwise_those_of_python(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats = (6,)
    shapes = (EVENT, EVENT, EVENT, EVENT, (3, 1), (), nats)
    inputs = leaves(*shapes, dtype=dtype)
    fast = run(CALLS[name], inputs)
    with in_python(monkeypatch):
        slow = run(CALLS[name], inputs)
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_nodes_are_those_of_c_plus_plus(name: str) -> None:
    torch.manual_seed(0)
    outputs = CALLS[name](leaves(EVENT, EVENT, EVENT, EVENT, (3, 1), (), (6,)))
    first = outputs if isinstance(outputs, Tensor) else outputs[0]  # type: ignore[index]
    assert first.grad_fn is not None
    kind = {"likelihood": "LikelihoodBackward", "elbo": "ELBOBackward"}.get(name.split(",")[0])
    assert first.grad_fn.name() == (kind or "LatentBackward")
    assert not isinstance(first.grad_fn, torch.autograd.function.BackwardCFunction)


def test_no_graph_is_made_where_no_gradient_is_wanted() -> None:
    mean, logvar = leaves(EVENT, EVENT)
    with torch.no_grad():
        assert reparameterize_kl(mean, logvar)[0].grad_fn is None
    with torch.inference_mode():
        z, kl = reparameterize_kl(mean, logvar)
    assert z.grad_fn is None and z.is_inference() and kl.is_inference()
    z, kl = reparameterize_kl(mean.detach(), logvar.detach())
    assert not z.requires_grad and not kl.requires_grad


class Watched(Tensor):
    """A subclass that takes part in everything."""


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def _subclass() -> tuple[object, ...]:
    return (torch.zeros(2, 3).as_subclass(Watched), torch.zeros(2, 3))


PASSED_ON: dict[str, Callable[[], tuple[object, ...]]] = {
    "no tensor": lambda: ([[0.0]], torch.zeros(1, 1)),
    "None": lambda: (None, torch.zeros(1, 1)),
    "integers": lambda: (torch.zeros(2, 3, dtype=torch.int64),) * 2,
    "complex": lambda: (torch.zeros(2, 3, dtype=torch.complex64),) * 2,
    "no batch": lambda: (torch.zeros(()), torch.zeros(())),
    "two shapes": lambda: (torch.zeros(2, 3), torch.zeros(2, 1)),
    "two dtypes": lambda: (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16)),
    "two devices": lambda: (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
    "meta": lambda: (torch.zeros(2, 3, device="meta"),) * 2,
    "sparse": lambda: (torch.zeros(2, 3).to_sparse(),) * 2,
    "a lazy negation": lambda: (torch.zeros(2, 3, dtype=torch.complex64).conj().imag,) * 2,
    "a subclass": _subclass,
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_not_plain_is_left_to_python(name: str) -> None:
    first, second = PASSED_ON[name]()
    assert fastpath.reparameterize_kl(first, second, None, None, "sample") is None
    assert fastpath.gaussian_kl(first, second, None, None, "sample") is None
    assert fastpath.posterior(first, second, -1, -1.0, 1.0, True, "sample") is None
    assert fastpath.gaussian_log_likelihood(first, second, None, "sample") is None
    assert fastpath.elbo_loss(first, second, second, second, None, None, 1.0, "sum") is None


@pytest.mark.parametrize("reduction", ["mean", 1, ["sum"], None])
def test_reductions_that_do_not_exist_are_left_to_python(reduction: object) -> None:
    a = torch.zeros(2, 3)
    assert fastpath.gaussian_kl(a, a, None, None, reduction) is None
    assert fastpath.gaussian_log_likelihood(a, a, None, reduction) is None
    assert fastpath.elbo_loss(a, a, a, a, None, None, 1.0, reduction) is None
    if reduction is not None:  # which stands for no KL there
        assert fastpath.posterior(a, a, -1, -1.0, 1.0, True, reduction) is None
        assert fastpath.reparameterize_kl(a, a, None, None, reduction) is None


def test_odd_combinations_of_arguments_are_left_to_python() -> None:
    a, row, nats = torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)
    assert fastpath.reparameterize_kl(a, a, a, None, "sample") is None
    assert fastpath.reparameterize_kl(a, a, row, row, "sample") is None
    assert fastpath.gaussian_log_likelihood(a, a, "unit", "sample") is None
    assert fastpath.gaussian_log_likelihood(a, a, float("nan"), "sample") is None
    assert fastpath.gaussian_log_likelihood(a, a, True, "sample") is None
    assert fastpath.gaussian_log_likelihood(a, row, None, "sample") is None
    assert fastpath.elbo_loss(a, a, a, a, nats, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, None, None, None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a, None, None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a[:1], a[:1], None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, None, None, row, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, None, None, nats.double(), None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a.double(), a.double(), None, None, 1.0, "sum") is None
    assert fastpath.elbo_loss(a, a, a, a, None, None, float("nan"), "sum") is None
    assert fastpath.elbo_loss(a, a, a, a, None, None, 1.0, "none") is None


def test_whoever_watches_sees_python() -> None:
    a = torch.zeros(2, 3)

    def taken(mean: Tensor) -> bool:
        done = fastpath.reparameterize_kl(mean, mean, None, None, "sample")
        return done is not None

    assert taken(a)
    with Mode():
        assert not taken(a)
    with FakeTensorMode() as mode:
        assert not taken(mode.from_tensor(a))
    with forward_ad.dual_level():
        assert not taken(forward_ad.make_dual(a, a))
    seen = []
    torch.func.grad(lambda t: (seen.append(taken(t)), t.sum())[1])(a)
    torch.func.vmap(lambda t: (seen.append(taken(t)), t)[1])(a.expand(4, 2, 3))
    torch.jit.trace(lambda t: (seen.append(taken(t)), t + 1)[1], (a,), check_trace=False)
    assert seen == [False, False, False]
    assert taken(a)


def test_an_explicit_choice_of_another_backend_is_respected() -> None:
    a = torch.zeros(2, 3)
    assert fastpath.gaussian_kl(a, a, None, None, "sample") is not None
    with fused_elbo.use_backend("reference"):
        gaussian_kl(a, a)
        assert fastpath.gaussian_kl(a, a, None, None, "sample") is None
        with fused_elbo.use_backend("cpu"):
            gaussian_kl(a, a)
            assert fastpath.gaussian_kl(a, a, None, None, "sample") is not None
        assert fastpath.gaussian_kl(a, a, None, None, "sample") is None
    fused_elbo.tracing.enable()
    try:
        assert fastpath.gaussian_kl(a, a, None, None, "sample") is None
    finally:
        fused_elbo.tracing.disable()
    assert fastpath.gaussian_kl(a, a, None, None, "sample") is not None


def test_a_parameter_is_a_plain_tensor() -> None:
    mean = torch.nn.Parameter(torch.zeros(2, 3))
    z, _ = reparameterize_kl(mean, mean)
    assert z.grad_fn is not None and z.grad_fn.name() == "LatentBackward"


def test_an_input_changed_after_forward_is_noticed() -> None:
    for changed in range(3):
        mean, logvar = (t.clone() for t in leaves(EVENT, EVENT))
        seed = torch.tensor(5)
        z, _ = reparameterize_kl(mean, logvar, key=NoiseKey(seed))
        with torch.no_grad():
            (mean, logvar, seed)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


@pytest.mark.parametrize("name", ["reparameterize_kl", "likelihood", "elbo"])
def test_a_second_backward_needs_the_graph_kept(name: str) -> None:
    outputs = CALLS[name](leaves(EVENT, EVENT, EVENT, EVENT))
    total = outputs.sum() if isinstance(outputs, Tensor) else outputs[0].sum()  # type: ignore[index]
    total.backward(retain_graph=True)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("name", ["reparameterize_kl, prior", "likelihood, full", "elbo, full"])
def test_hooks_see_everything_that_is_saved(name: str) -> None:
    inputs = leaves(EVENT, EVENT, EVENT, EVENT, (3, 1), (), (6,))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or len(saved) - 1, saved.__getitem__
    ):
        outputs = CALLS[name](inputs)
        first = outputs if isinstance(outputs, Tensor) else outputs[0]  # type: ignore[index]
        torch.autograd.grad(first.sum(), inputs, allow_unused=True)
    kept = {t.data_ptr() for t in saved} - {t.data_ptr() for t in inputs}
    # Besides inputs: the seed; for the ELBO the gradients of recon_x and recon_logvar.
    assert (
        sum(t.data_ptr() in kept and t.numel() > 0 for t in saved)
        == {
            "reparameterize_kl, prior": 1,
            "likelihood, full": 0,
            "elbo, full": 2,
        }[name]
    )


def test_an_error_in_a_backward_with_a_graph_arrives_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("from the formula")

    (mean, logvar) = leaves(EVENT, EVENT)
    monkeypatch.setattr("fused_elbo.calls.latent_backward_plain", fails)
    z, _ = reparameterize_kl(mean, logvar)
    with pytest.raises(ZeroDivisionError, match="from the formula"):
        torch.autograd.grad(z.sum(), mean, create_graph=True)


@pytest.mark.usefixtures("called")
def test_the_profiler_shows_the_operations_by_name() -> None:
    mean, logvar = leaves(EVENT, EVENT)
    with torch.profiler.profile(record_shapes=True) as profile:
        z, kl = reparameterize_kl(mean, logvar)
        (z.sum() + kl.sum()).backward()
        elbo_loss(mean, logvar, mean, logvar).loss.backward()
        gaussian_log_likelihood(mean, logvar).sum().backward()
    shapes = {e.key: e.input_shapes for e in profile.key_averages(group_by_input_shape=True)}
    for name in ("latent_forward", "latent_backward", "likelihood_forward", "likelihood_backward"):
        assert shapes[f"fused_elbo::{name}"][:2] == [list(EVENT), list(EVENT)]
    assert "fused_elbo::elbo_forward" in shapes


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """What backward is compiled into inside."""
    compiled_autograd = importlib.import_module("torch._dynamo.compiled_autograd")
    found: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    on = importlib.import_module("torch._dynamo.config").patch(compiled_autograd=True)
    with on, compiled_autograd._enable(compiler):
        yield found
    compiled_autograd.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd_has_the_nodes_in_its_graph(
    name: str, graphs: list[torch.fx.GraphModule]
) -> None:
    inputs = leaves(EVENT, EVENT, EVENT, EVENT, (3, 1), (), (6,))
    found = run(CALLS[name], inputs)
    with torch._dynamo.compiled_autograd._disable():
        expected = run(CALLS[name], inputs)
    assert len(graphs) == 1
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_compiled_autograd_compiles_once_for_all_keys(graphs: list[torch.fx.GraphModule]) -> None:
    mean, logvar = leaves((2, 3), (2, 3))
    for key in (NoiseKey(5), NoiseKey(6, 1, 2)):
        z, kl = reparameterize_kl(mean, logvar, key=key)
        (grad,) = torch.autograd.grad(z.sum() + kl.sum(), logvar)
        eps = (z - mean) / (logvar / 2).exp()
        expected = (eps * (logvar / 2).exp() + logvar.exp() - 1) / 2
        torch.testing.assert_close(grad, expected)
    assert len(graphs) == 1


def test_nothing_is_kept_alive() -> None:
    mean, logvar = leaves((256, 1024), (256, 1024))
    gone = []

    def step() -> None:
        z, kl = reparameterize_kl(mean, logvar)
        out = elbo_loss(z, mean, kl=kl)
        ll = gaussian_log_likelihood(z, mean)
        gone.append([weakref.ref(each) for each in (z, kl, out.loss, ll)])
        torch.autograd.grad(out.loss + ll.sum(), (mean, logvar), create_graph=len(gone) % 2 == 0)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(20):
        step()
    gc.collect()
    before = resident()
    for _ in range(200):  # 1 MB a tensor: anything kept would show
        step()
    gc.collect()
    assert resident() - before < 50e6
    assert not [ref for refs in gone for ref in refs if ref() is not None]


def test_a_wrong_number_of_arguments_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected 5 arguments, got 2"):
        fastpath.gaussian_kl(torch.zeros(1, 1), torch.zeros(1, 1))
