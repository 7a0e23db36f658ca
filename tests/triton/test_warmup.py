"""Compiling before use: which kernels are asked for, and what is said where there is no device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fused_elbo import Parametrization
from fused_elbo.triton import aot, launch, reason, warmup

from .test_specialization import keys

SHAPES = [(16, 4, 32, 32), (16, 3, 64, 64)]


def required_keys(**options: object) -> set[tuple[str, str]]:
    launches = warmup.required(SHAPES, [torch.float32], **options)
    found: set[tuple[str, str]] = set()
    for one in launches:
        found.update(keys(lambda one=one: _replay(one)))
    return found


def _replay(one: object) -> None:
    launch.launch(one.kernel, one.programs, torch.device("meta"), **one.args)


@pytest.mark.parametrize("batch", [16, 7, 1, 40000])
def test_a_training_step_needs_nothing_that_was_not_warmed_up(batch: int) -> None:
    from fused_elbo.schemas import BATCHMEAN
    from fused_elbo.triton import elbo_operations, latent_operations

    warm = required_keys(operations=["reparameterize_kl", "elbo_loss"])

    def step() -> None:
        mean = torch.empty(batch, 4, 32, 32, device="meta")
        image, nats = (
            torch.empty(batch, 3, 64, 64, device="meta"),
            torch.empty(batch, device="meta"),
        )
        seed = torch.empty((), dtype=torch.int64, device="meta")
        z, kl = latent_operations.latent_forward(mean, mean, None, None, seed)
        elbo_operations.elbo_forward(
            image, image, None, 0.0, None, None, kl, None, 1.0, BATCHMEAN, True
        )
        latent_operations.latent_backward(mean, mean, None, None, z, nats, seed)

    needed = set(keys(step))
    assert len(needed) >= 4
    assert needed <= warm


@pytest.mark.parametrize("batch", [16, 7])
def test_a_step_with_a_parametrization_and_a_mask_needs_nothing_more(batch: int) -> None:
    from fused_elbo.parametrization import SOFTPLUS_STD
    from fused_elbo.triton import latent_operations, likelihood_operations

    warm = required_keys(
        operations=["gaussian_kl", "gaussian_log_likelihood"],
        param=Parametrization("softplus_std", 1e-4),
        mask_dims=(0, -2, -1),
    )

    def step() -> None:
        mean, nats = torch.empty(batch, 4, 32, 32, device="meta"), torch.empty(batch, device="meta")
        mask = torch.empty(batch, 1, 32, 32, dtype=torch.bool, device="meta").expand(mean.shape)
        scale = {"scale": SOFTPLUS_STD, "floor": 0.5}
        latent_operations.latent_forward(mean, mean, None, None, None, mask, want_z=False, **scale)
        latent_operations.latent_backward(mean, mean, None, None, None, nats, None, mask, **scale)
        likelihood_operations.likelihood_forward(mean, mean, mean, mask, **scale)
        likelihood_operations.likelihood_backward(mean, mean, mean, nats, True, True, mask, **scale)

    needed = set(keys(step))
    assert len(needed) >= 4
    assert needed <= warm
    assert not needed & required_keys(operations=["gaussian_kl", "gaussian_log_likelihood"])


def test_every_required_kernel_compiles() -> None:
    seen = set()
    for one in warmup.required([(8, 6, 16, 16)], [torch.float16], channels_last=True, priors=True):
        key = aot._key(one)
        if key not in seen:
            seen.add(key)
            assert aot.compile_launch(one, aot.gpu_target("sm_90")).asm["cubin"]
    assert len(seen) >= 10


class StandInDriver:
    """What Triton asks a driver for before it loads a kernel."""

    def get_current_target(self) -> GPUTarget:
        return aot.gpu_target("sm_90")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def device_without_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", StandInDriver())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_launch_asks_for_what_is_compiled_ahead_of_time(
    dtype: torch.dtype, device_without_hardware: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Triton's own `run`, to where it would compile: names it reserves, options it does not
    know and arguments it cannot pass all show here, and the source is that of `aot`.
    """
    asked = []

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        asked.append((ASTSource(self, signature, constexprs, attrs), options))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", do_compile)
    options = launch.options(32)
    backend = make_backend(aot.gpu_target("sm_90"))
    for name, one in aot.launches(dtype):
        one.kernel.device_caches.clear()
        one.kernel.warmup(grid=(one.programs,), **one.args, **options)
        source, asked_options = asked.pop()
        expected = aot.source(one)
        assert source.signature == expected.signature, name
        assert source.constants == expected.constants, name
        assert {place: a for place, a in source.attrs.items() if a} == expected.attrs, name
        assert asked_options.hash() == backend.parse_options(dict(options)).hash(), name


def test_unknown_operations_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown operations"):
        warmup.required(SHAPES, [torch.float32], ["softmax"])
    with pytest.raises(ValueError, match="batch dimension"):
        warmup.required([()], [torch.float32])
    with pytest.raises(ValueError, match="param must be one of"):
        warmup.required(SHAPES, [torch.float32], param="sigma")
    with pytest.raises(ValueError, match="mask_dims must be dimensions of the shape"):
        warmup.required(SHAPES, [torch.float32], mask_dims=(4,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why it cannot, where it cannot")
def test_without_a_device_the_reason_is_given() -> None:
    why = reason()
    assert why is not None
    with pytest.raises(RuntimeError, match="warm_up: " + why[:20]):
        warmup.warm_up(SHAPES)
    command = [
        sys.executable,
        "-m",
        "fused_elbo.triton.warmup",
        "--shapes",
        "64x4x32x32",
        "--device",
        "cuda:0",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert why in run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_warm_process_compiles_nothing_more() -> None:
    from fused_elbo import reparameterize_kl, use_backend
    from fused_elbo.triton.latent import latent_forward_kernel

    warmup.warm_up([(16, 4, 32, 32)], operations=["reparameterize_kl"])
    cached = {
        device: len(cache[0]) for device, cache in latent_forward_kernel.device_caches.items()
    }
    mean = torch.randn(16, 4, 32, 32, device="cuda")
    with use_backend("triton"):
        reparameterize_kl(mean, mean)
    assert {
        device: len(cache[0]) for device, cache in latent_forward_kernel.device_caches.items()
    } == cached


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, fused_elbo.triton; fused_elbo.triton.reason(); "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
