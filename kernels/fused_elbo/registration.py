"""Registration with torch.library: the shapes of raw operations, and the differentiable operations
of compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls import (
    Kernels,
    LatentParams,
    LikelihoodParams,
    latent_backward_raw,
    likelihood_backward_raw,
    present,
)
from .elbo_call import ELBOInputs, ELBOParams, elbo_backward_scaled
from .parametrization import ScaleParams
from .schemas import FAKES, SCHEMAS


@functools.cache
def kernels(namespace: str) -> Kernels:
    """The operations of a namespace that has its raw ones, with shapes and autograd registered."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    raw = {name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS}
    for name in ("latent", "likelihood", "elbo"):
        forward = raw[f"{name}_forward"]
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        library.define(name + SCHEMAS[f"{name}_forward"])
        library.impl(name, forward, "CompositeExplicitAutograd")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, FAKES[f"{name}_forward"], lib=library)
        setup, backward = _COMPILED_AUTOGRAD[name]
        torch.library.register_autograd(
            qualified, functools.partial(backward, namespace), setup_context=setup, lib=library
        )
    return Kernels(namespace, **raw, elbo_backward=elbo_backward_scaled)


# Kept: a library undefines its operations when it is collected.
_libraries: list[torch.library.Library] = []


def _setup_latent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.params = LatentParams(*inputs[6:])


def _compiled_latent_backward(
    namespace: str, ctx: Any, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    grads = latent_backward_raw(
        kernels(namespace), ctx.params, ctx.saved_tensors, grad_z, grad_kl, needed[2] or needed[3]
    )
    return *present(grads, needed[:4]), *(None,) * (2 + len(ctx.params))


def _setup_likelihood(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.params = LikelihoodParams(*inputs[4:])


def _compiled_likelihood_backward(namespace: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = likelihood_backward_raw(
        kernels(namespace), ctx.params, ctx.saved_tensors, grad, ctx.needs_input_grad[:3]
    )
    return *grads, *(None,) * (1 + len(ctx.params))


def _setup_elbo(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    recon_x, x, recon_logvar, recon_logvar_value, mean, logvar, kl, beta, *rest = inputs
    beta_value, reduction, _, mask, *scale = rest
    ctx.save_for_backward(recon_x, x, recon_logvar, mean, logvar, kl, beta, mask, *output[3:])
    ctx.params = ELBOParams(recon_logvar_value, beta_value, reduction, ScaleParams(*scale))


def _compiled_elbo_backward(
    namespace: str, ctx: Any, grad_loss: Tensor, *_: Any
) -> tuple[Any, ...]:
    needed, saved = ctx.needs_input_grad, ctx.saved_tensors
    recon, x, recon_logvar, mean, logvar, kl = elbo_backward_scaled(
        ELBOInputs(*saved[:8]),
        ctx.params,
        saved[8:],
        grad_loss,
        (*needed[:3], *needed[4:7]),
    )
    return recon, x, recon_logvar, None, mean, logvar, kl, *(None,) * 9


_COMPILED_AUTOGRAD: dict[str, tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]] = {
    "latent": (_setup_latent, _compiled_latent_backward),
    "likelihood": (_setup_likelihood, _compiled_likelihood_backward),
    "elbo": (_setup_elbo, _compiled_elbo_backward),
}
