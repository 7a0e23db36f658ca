"""Ahead-of-time compilation: every kernel variant for any target, without a device.

    for variant in compile_variants("sm_90"):
        variant.name, variant.compiled.asm["ptx"], variant.compiled.asm["cubin"]

A variant is what a real call would compile: the launchers run on meta tensors and their launches
are compiled instead of executed. Not in a process that interprets (``TRITON_INTERPRET=1``).
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..parametrization import PLAIN_SCALE, Parametrization, ScaleParams, scale_params
from ..schemas import BATCHMEAN, NONE, OFF, SAMPLE, halves, nats_like
from . import elbo_operations, geometry, latent_operations, likelihood_operations
from .launch import Launch, options, recording

#: What the tests compile for: Ampere, Hopper, Blackwell (data center and desktop), MI300.
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

_POINTEES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Variant(NamedTuple):
    """A compiled kernel: ``name`` says what it does, ``elements`` how many a program handles per
    trip of its loop.
    """

    name: str
    kernel: str
    target: str
    elements: int
    threads: int
    dtype: torch.dtype
    aligned: bool
    compiled: Any


def gpu_target(name: str) -> GPUTarget:
    """``sm_90``, ``gfx942`` and so on."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compiles a recorded launch."""
    return triton.compile(source(launch), target=target, options=options(target.warp_size))


def source(launch: Launch) -> ASTSource:
    """The specialization that running a launch would ask for."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    divisible = {}
    parameters = inspect.signature(launch.kernel.fn).parameters
    for place, (name, parameter) in enumerate(parameters.items()):
        value = launch.args[name]
        if parameter.annotation is tl.constexpr:
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, geometry.Layout):
            kind, *strides = value
            constants[(place, 0)] = kind.value
            for i in range(1, len(value)):
                divisible[(place, i)] = [["tt.divisibility", geometry.STRIDE_SCALE]]
            signature[name] = geometry.Layout("constexpr", *map(_integer, strides))  # type: ignore[arg-type]
        elif value is None:
            signature[name], constants[(place,)] = "constexpr", None
        elif isinstance(value, Tensor):
            signature[name] = f"*{_POINTEES[value.dtype]}"
        else:
            signature[name] = {tl.int32: "i32", tl.int64: "i64"}[parameter.annotation]
    return ASTSource(launch.kernel, signature, constants, divisible)


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


#: Kinds of representative calls: the commonest ones; layouts, reductions and broadcasts; scale
#: parametrizations and masks. The last two only in float32 and bfloat16.
CALLS = ("common", "layouts", "policies")


def launches(dtype: torch.dtype, kinds: tuple[str, ...] = CALLS) -> Iterator[tuple[str, Launch]]:
    """The launches of representative calls, named; all `CALLS` are every kernel with every policy
    that changes its code.
    """
    makers = {"common": _common_calls, "layouts": _layout_calls, "policies": _policy_calls}
    calls = itertools.chain.from_iterable(makers[kind](dtype) for kind in kinds)
    seen = set()
    for name, call in calls:
        with recording() as recorded:
            call()
        for launch in recorded:
            key = _key(launch)
            if key not in seen:
                seen.add(key)
                yield name, launch


def compile_variants(
    target: str,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    kinds: tuple[str, ...] = CALLS,
) -> Iterator[Variant]:
    """Compiles every variant for a target such as ``sm_90`` or ``gfx942``."""
    for dtype in dtypes:
        for name, launch in launches(dtype, kinds):
            yield compile_variant(name, launch, dtype, target)


def compile_variant(name: str, launch: Launch, dtype: torch.dtype, target: str) -> Variant:
    args = launch.args
    if "RECON_WIDTH" in args:
        elements, aligned = (
            args["RECON_ROWS"] * args["RECON_WIDTH"],
            args["RECON_ALIGNED"] and args["LATENT_ALIGNED"],
        )
    else:
        elements, aligned = args.get("ROWS", 1) * args.get("WIDTH", 1), args.get("ALIGNED", False)
    gpu = gpu_target(target)
    return Variant(
        name=name,
        kernel=launch.kernel.fn.__name__,
        target=target,
        elements=elements,
        threads=geometry.THREADS,
        dtype=dtype,
        aligned=aligned,
        compiled=compile_launch(launch, gpu),
    )


def _key(launch: Launch) -> tuple[Any, ...]:
    """What a launch is compiled for: policies, which tensors there are and of which dtype, kinds of
    layouts.
    """
    parts: list[Any] = [launch.kernel.fn.__name__]
    for name, value in launch.args.items():
        if isinstance(value, geometry.Layout):
            parts.append((name, value.kind.value))
        elif name.isupper() or value is None:
            parts.append((name, str(value)))
        elif isinstance(value, Tensor):
            parts.append((name, value.dtype))
    return tuple(parts)


class _Shapes:
    """Tensors of one dtype without storage."""

    clamp = ScaleParams(clamp_min=-30.0, clamp_max=20.0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide, self.image = self.meta(64, 65536), self.meta(16, 3, 256, 256)
        self.moments = self.meta(16, 8, 64, 64)

    def meta(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")


def _common_calls(dtype: torch.dtype) -> _Calls:
    shapes = _Shapes(dtype)
    wide, image, moments, clamp = shapes.wide, shapes.image, shapes.moments, shapes.clamp
    yield from _latent_calls("sample and KL", wide, wide)
    yield from _latent_calls("sample and KL, prior", wide, wide, prior=True)
    yield from _latent_calls("samples and KL", wide, wide, samples=8)
    yield from _latent_calls("moments", moments, None, chunk=1, scale=clamp)
    yield from _likelihood_calls("likelihood, unit variance", image, None)
    yield from _likelihood_calls("likelihood, variance per element", image, image)
    yield from _elbo_calls("elbo, unit variance", image, None)
    yield from _elbo_calls("elbo, variance per element", image, image)


def _layout_calls(dtype: torch.dtype) -> _Calls:
    """Layouts, reductions and broadcasts, which no dtype treats in a way of its own."""
    if dtype not in (torch.float32, torch.bfloat16):
        return
    shapes = _Shapes(dtype)
    wide, image, moments, clamp = shapes.wide, shapes.image, shapes.moments, shapes.clamp
    meta = shapes.meta
    last = moments.to(memory_format=torch.channels_last)
    ragged, apart = meta(64, 4999), meta(64, 65540)[:, 1:-3]
    small = meta(1024, 128)
    yield from _latent_calls("moments, channels last", last, None, chunk=1, scale=clamp)
    yield from _latent_calls(
        "moments, last dimension", meta(16, 256, 128), None, chunk=2, scale=clamp
    )
    yield from _latent_calls("sample and KL, small rows", small, small)
    yield from _latent_calls("sample and KL, ragged rows", ragged, ragged)
    yield from _latent_calls("sample and KL, misaligned", apart, apart)
    yield from _latent_calls("sample", wide, wide, reduction=OFF)
    yield from _latent_calls("KL", wide, wide, sample=False)
    yield from _latent_calls("KL per element", wide, wide, sample=False, reduction=NONE)
    yield from _likelihood_calls("likelihood, one learned variance", image, meta())
    yield from _likelihood_calls("likelihood, variance per pixel", image, meta(256, 256))
    yield from _likelihood_calls("likelihood per element", image, None, reduction=NONE)
    yield from _elbo_calls("elbo, one learned variance", image, meta())
    yield "seeds", lambda: latent_operations.fold_seed(_SEED, 1)
    yield "noise words", lambda: latent_operations.noise_words(_SEED, 0, 0, 0, 1000)
    if dtype != torch.float32:
        return
    # What follows changes which numbers are added and stored, and not how a dtype is handled.
    yield from _latent_calls("sample and KL, batch mean", wide, wide, reduction=BATCHMEAN)
    yield from _latent_calls("KL, batch mean", wide, wide, sample=False, reduction=BATCHMEAN)
    yield from _latent_calls("KL, prior", wide, wide, sample=False, prior=True)
    yield from _latent_calls("moments, prior", moments, None, chunk=1, scale=clamp, prior=True)
    yield from _latent_calls("moments, samples", moments, None, chunk=1, scale=clamp, samples=4)
    yield from _latent_calls("moments, sample", moments, None, chunk=1, scale=clamp, reduction=OFF)
    yield from _latent_calls("moments, KL", moments, None, chunk=1, scale=clamp, sample=False)
    yield from _likelihood_calls("likelihood, variance per channel", image, meta(3, 1, 1))
    yield from _likelihood_calls("likelihood, small rows", meta(1024, 784), None)
    yield from _likelihood_calls(
        "likelihood per element, variance per element", image, image, reduction=NONE
    )
    yield from _likelihood_calls("likelihood, batch mean", image, None, reduction=BATCHMEAN)
    yield from _likelihood_calls(
        "likelihood, samples", image[None].expand(4, *image.shape), None, batch_dims=2
    )
    yield from _elbo_calls("elbo, variance per channel", image, meta(3, 1, 1))
    yield from _elbo_calls("elbo, variance per pixel", image, meta(256, 256))
    yield from _elbo_calls("elbo, KL given", image, None, kl_given=True)


#: One of every kind of scale, with what else changes its code.
PARAMETRIZATIONS = {
    "floored logvar": Parametrization("logvar", 1e-4),
    "logstd, soft clamp": Parametrization("logstd", 0.0, (-5.0, 5.0), True),
    "softplus std": Parametrization("softplus_std", 0.0, (-20.0, 20.0)),
    "variance": Parametrization("var", 1e-6),
}


def _policy_calls(dtype: torch.dtype) -> _Calls:
    """Scale parametrizations and masks."""
    if dtype not in (torch.float32, torch.bfloat16):
        return
    shapes = _Shapes(dtype)
    wide, image = shapes.wide, shapes.image
    for name, param in PARAMETRIZATIONS.items():
        scale = scale_params(param, with_prior=True)
        prior = param.name == "logstd"
        label = f"{name}, prior" if prior else name
        yield from _latent_calls(f"sample and KL, {label}", wide, wide, prior=prior, scale=scale)
        yield from _likelihood_calls(f"likelihood, {name}", image, image, scale=scale)
    softplus = scale_params(PARAMETRIZATIONS["softplus std"], with_prior=True)
    yield from _elbo_calls("elbo, softplus std", image, image, scale=softplus)
    frames = torch.empty(16, 1, 256, 256, dtype=torch.bool, device=_META).expand(image.shape)
    each = torch.empty_like(wide, dtype=torch.bool)
    yield from _latent_calls("sample and KL, mask", wide, wide, mask=each)
    yield from _likelihood_calls("likelihood, mask", image, None, mask=frames)
    yield from _elbo_calls("elbo, variance per element, mask", image, image, mask=frames)


_META = torch.device("meta")
_SEED = torch.empty((), dtype=torch.int64, device=_META)
_Calls = Iterator[tuple[str, Callable[[], Any]]]


def _latent_calls(
    label: str,
    mean: Tensor,
    logvar: Tensor | None,
    *,
    prior: bool = False,
    samples: int = 0,
    chunk: int = -1,
    scale: ScaleParams = PLAIN_SCALE,
    mask: Tensor | None = None,
    sample: bool = True,
    reduction: int = SAMPLE,
) -> _Calls:
    part, _ = halves(mean, logvar, chunk)
    prior_mean = torch.empty_like(part) if prior else None
    like_z = (
        torch.empty((samples, *part.shape), dtype=mean.dtype, device=_META)
        if samples
        else torch.empty_like(part)
    )
    grad_z = like_z if sample else None
    grad_kl = None if reduction == OFF else torch.empty_like(nats_like(part, 1, reduction))
    inputs = (mean, logvar, prior_mean, prior_mean)
    forward: Callable[..., Any] = latent_operations.latent_forward
    backward: Callable[..., Any] = latent_operations.latent_backward
    params = (_SEED, mask, 0, 0, 0, samples, chunk, *scale)
    yield (
        f"{label}, forward",
        lambda: forward(*inputs, *params, sample, reduction),
    )
    yield (
        f"{label}, backward",
        lambda: backward(*inputs, grad_z, grad_kl, *params, reduction, prior),
    )


def _likelihood_calls(
    label: str,
    x: Tensor,
    logvar: Tensor | None,
    *,
    reduction: int = SAMPLE,
    batch_dims: int = 1,
    scale: ScaleParams = PLAIN_SCALE,
    mask: Tensor | None = None,
) -> _Calls:
    mean = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad = nats_like(mean, batch_dims, reduction)
    params = (mask, 0.0, batch_dims, reduction, *scale)
    yield (
        f"{label}, forward",
        lambda: likelihood_operations.likelihood_forward(x, mean, logvar, *params),
    )
    yield (
        f"{label}, backward",
        lambda: likelihood_operations.likelihood_backward(
            x, mean, logvar, grad, True, logvar is not None, *params
        ),
    )


def _elbo_calls(
    label: str,
    x: Tensor,
    logvar: Tensor | None,
    *,
    kl_given: bool = False,
    scale: ScaleParams = PLAIN_SCALE,
    mask: Tensor | None = None,
) -> _Calls:
    latent = None if kl_given else x.new_empty(x.shape[0], 4, 32, 32)
    kl = nats_like(x, 1, SAMPLE) if kl_given else None
    given = (x, x, logvar, 0.0, latent, latent, kl, None, 1.0, BATCHMEAN)
    for want_grads in (False, True):
        yield (
            f"{label}{', with gradients' if want_grads else ''}",
            functools.partial(elbo_operations.elbo_forward, *given, want_grads, mask, *scale),
        )
