"""Kernels that tell what they do: the same operations in named ranges, and written down.

`backends.select` hands these out while `tracing` is on or ``FUSED_ELBO_CAPTURE`` is set. They are a
namespace of their own (``fused_elbo_instrumented``, ...), so that a compiled graph, which calls
operations and not Python functions, has its ranges at run time, forward and backward, without a
graph break.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import calls, capture, elbo_call, ops, reference, tracing
from .calls import Kernels, LatentParams, LikelihoodParams
from .elbo_call import ELBOInputs, ELBOParams
from .noise import NoiseKey
from .parametrization import PLAIN_SCALE, ScaleParams
from .schemas import OFF, SAMPLE, SCHEMAS

_RANGED = (
    "latent_forward",
    "latent_backward",
    "likelihood_forward",
    "likelihood_backward",
    "elbo_forward",
)
# operation -> where its arguments with defaults begin, and what they are.
_DEFAULTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "latent_forward": (5, (None, *LatentParams())),
    "latent_backward": (7, (None, *LatentParams()[:-2], SAMPLE, False)),
    "likelihood_forward": (3, (None, *LikelihoodParams())),
    "likelihood_backward": (6, (None, *LikelihoodParams())),
    "elbo_forward": (11, (None, *PLAIN_SCALE)),
}
# Kept: a library undefines its operations when it is collected.
_libraries: list[torch.library.Library] = []


def wanted() -> bool:
    """Whether kernels are to be handed out instrumented."""
    return tracing.is_enabled() or capture.is_enabled()


@functools.cache
def instrument(kernels: Kernels | None) -> Kernels:
    """The same kernels, each in a range; None stands for the reference."""
    if kernels is not None and kernels.namespace.endswith("_instrumented"):
        return kernels
    namespace = "fused_elbo_reference" if kernels is None else kernels.namespace
    plain = _reference_operations() if kernels is None else kernels._asdict()
    operations = {
        name: _observed(name, namespace, plain[name]) if name in _RANGED else plain[name]
        for name in SCHEMAS
    }

    instrumented = f"{namespace}_instrumented"
    library = torch.library.Library(instrumented, "DEF")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, operations[name], "CompositeExplicitAutograd")
    # Eager code calls the Python functions: the dispatcher would cost more than the range.
    return ops.kernels(instrumented)._replace(
        elbo_backward=_ranged_elbo_backward(namespace),
        **operations,  # type: ignore[arg-type]
    )


def _observed(name: str, namespace: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    start, defaults = _DEFAULTS.get(name, (0, ()))

    def observed(*args: Any) -> Any:
        if defaults:
            args = (*args, *defaults[len(args) - start :])
        first: Tensor = args[0]
        backend = _backend(namespace, first)
        if capture.is_enabled():
            capture.record(name, backend, args)
        if not tracing.is_enabled():
            return operation(*args)
        place = {"latent_forward": 9, "latent_backward": 11}.get(name, len(args))
        samples = args[place] if place < len(args) else 0
        with tracing.Range(_message(name, backend, first, samples), first.numel()):
            return operation(*args)

    return observed


def _ranged_elbo_backward(namespace: str) -> Callable[..., Any]:
    """The gradients of `elbo` exist when its backward runs, which at most scales them."""

    def elbo_backward(inputs: ELBOInputs, *args: Any) -> Any:
        message = _message("elbo_backward", _backend(namespace, inputs.recon_x), inputs.recon_x, 0)
        if not tracing.is_enabled():
            return elbo_call.elbo_backward_scaled(inputs, *args)
        with tracing.Range(message, inputs.recon_x.numel()):
            return elbo_call.elbo_backward_scaled(inputs, *args)

    return elbo_backward


def _backend(namespace: str, tensor: Tensor) -> str:
    # One namespace holds the CPU and the CUDA kernels; the others are named after their backend.
    return (
        tensor.device.type if namespace == "fused_elbo" else namespace.removeprefix("fused_elbo_")
    )


def _message(name: str, backend: str, tensor: Tensor, samples: int) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    message = f"{name} {backend} {dtype} {list(tensor.shape)}"
    return f"{message} K={samples}" if samples else message


# --------------------------------------------------------------- the reference as raw operations


def _reference_operations() -> dict[str, Callable[..., Any]]:
    """The raw operations in plain PyTorch, which has none: `ops` runs its formulas directly."""
    return {
        "latent_forward": _latent_forward,
        "latent_backward": _latent_backward,
        "likelihood_forward": _likelihood_forward,
        "likelihood_backward": _likelihood_backward,
        "elbo_forward": _elbo_forward,
        "fold_seed": reference.fold_seed,
        "noise_words": _noise_words,
    }


def _latent_forward(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    *params: Any,
) -> tuple[Tensor, Tensor]:
    return calls.latent_plain(
        None, LatentParams(*params), mean, logvar, prior_mean, prior_logvar, seed, mask
    )


def _latent_backward(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    *params: Any,
) -> tuple[Tensor, ...]:
    # Up to the scale both directions have the same parameters; what follows differs.
    reduction = OFF if grad_kl is None else params[-2]
    latent_params = LatentParams._make((*params[:-2], grad_z is not None, reduction))
    inputs = (mean, logvar, prior_mean, prior_logvar, seed, mask)
    return calls.latent_backward_plain(None, latent_params, inputs, grad_z, grad_kl)


def _likelihood_forward(
    x: Tensor, mean: Tensor, logvar: Tensor | None, mask: Tensor | None, *params: Any
) -> Tensor:
    return calls.likelihood_plain(LikelihoodParams(*params), x, mean, logvar, mask)


def _likelihood_backward(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    grad: Tensor,
    want_mean: bool,
    want_logvar: bool,
    mask: Tensor | None,
    *params: Any,
) -> tuple[Tensor, Tensor]:
    return calls.likelihood_backward_plain(LikelihoodParams(*params), x, mean, logvar, mask, grad)


def _elbo_forward(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | None,
    recon_logvar_value: float,
    mean: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    beta_value: float,
    reduction: int,
    want_grads: bool,
    mask: Tensor | None,
    *scale: Any,
) -> tuple[Tensor, ...]:
    inputs = ELBOInputs(recon_x, x, recon_logvar, mean, logvar, kl, beta, mask)
    params = ELBOParams(recon_logvar_value, beta_value, reduction, ScaleParams(*scale))
    loss, ll, kl_out = ops._elbo_from_parts(None, inputs, params)
    empty = recon_x.new_empty(0)
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if want_grads:
        grad_recon, _, *others, _ = elbo_call.elbo_backward_plain(
            inputs, params, torch.ones_like(loss)
        )
        grads = (grad_recon, *others)
    # An operation may not return its input, here a given kl.
    return loss, ll, kl_out.clone(), *(empty.clone() if g is None else g for g in grads)


def _noise_words(
    seed: Tensor | None,
    seed_value: int,
    stream: int,
    sample: int,
    first: int,
    count: int,
    device: torch.device,
) -> Tensor:
    key = NoiseKey(seed_value if seed is None else seed, stream)
    return reference.philox_words(key, sample, first, count, device)
