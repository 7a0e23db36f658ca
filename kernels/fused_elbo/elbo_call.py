"""The arguments of the ELBO, its gradients as they leave backward, and both in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .calls import REDUCTION_NAMES
from .parametrization import PLAIN_SCALE, ScaleParams


class ELBOInputs(NamedTuple):
    """The tensors of `elbo_forward` in its order, the number after ``recon_logvar`` and ``beta``
    left out."""

    recon_x: Tensor
    x: Tensor
    recon_logvar: Tensor | None
    mean: Tensor | None
    logvar: Tensor | None
    kl: Tensor | None
    beta: Tensor | None
    mask: Tensor | None = None


class ELBOParams(NamedTuple):
    """What of `elbo_forward` is no tensor; the scale is the decoder's."""

    recon_logvar_value: float
    beta_value: float
    reduction: int
    scale: ScaleParams = PLAIN_SCALE


def elbo_arguments(inputs: ELBOInputs, params: ELBOParams, want_grads: bool) -> tuple[Any, ...]:
    recon_x, x, recon_logvar, mean, logvar, kl, beta, mask = inputs
    masked_or_scaled = mask is not None or params.scale != PLAIN_SCALE
    return (
        recon_x,
        x,
        recon_logvar,
        params.recon_logvar_value,
        mean,
        logvar,
        kl,
        beta,
        params.beta_value,
        params.reduction,
        want_grads,
        *((mask, *params.scale) if masked_or_scaled else ()),
    )


def elbo_backward_scaled(
    inputs: ELBOInputs,
    params: ELBOParams,
    saved: tuple[Tensor, ...],
    grad_loss: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of the forward pass, times the upstream gradient."""
    recon_x, x, recon_logvar, mean, logvar, kl = needed
    scaled = _scaling(grad_loss)
    grad_recon = scaled(saved[0]) if recon_x or x else None
    grad_recon_logvar = None
    if recon_logvar and grad_loss.dim() == 1:
        # Summed over the batch before it could be scaled per sample: computed anew.
        grad_recon_logvar = elbo_backward_plain(inputs, params, grad_loss)[2]
    elif recon_logvar:
        grad_recon_logvar = scaled(saved[1])
    return (
        grad_recon if recon_x else None,
        -grad_recon if x and grad_recon is not None else None,
        grad_recon_logvar,
        scaled(saved[2]) if mean else None,
        scaled(saved[3]) if logvar else None,
        _kl_gradient(inputs, params, grad_loss) if kl else None,
    )


def _scaling(grad_loss: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplication by an upstream gradient: a number, or one per sample."""
    if _is_one(grad_loss):
        return lambda grad: grad
    if grad_loss.dim() == 0:
        return lambda grad: grad * grad_loss
    return lambda grad: grad * grad_loss.view(-1, *(1,) * (grad.dim() - 1)).to(grad.dtype)


def _is_one(grad_loss: Tensor) -> bool:
    """Whether scaling can be left out: where reading the number is free and no one keeps the
    graph."""
    return (
        type(grad_loss) is Tensor
        and grad_loss.dim() == 0
        and grad_loss.device.type == "cpu"
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and grad_loss.item() == 1.0
    )


def _kl_gradient(inputs: ELBOInputs, params: ELBOParams, grad_loss: Tensor) -> Tensor:
    batch = inputs.recon_x.shape[:1]
    beta = params.beta_value if inputs.beta is None else inputs.beta
    return beta * reference.spread(grad_loss, batch, REDUCTION_NAMES[params.reduction])


def elbo_backward_plain(
    inputs: ELBOInputs, params: ELBOParams, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the loss in differentiable PyTorch."""
    recon_x, x, recon_logvar, mean, logvar, kl, _, mask = inputs
    batch = recon_x.shape[:1]
    grad_ll = -reference.spread(grad_loss, batch, REDUCTION_NAMES[params.reduction])
    grad_recon, grad_recon_logvar = reference.log_likelihood_backward(
        x,
        recon_x,
        params.recon_logvar_value if recon_logvar is None else recon_logvar,
        1,
        "sample",
        grad_ll,
        params.scale,
        mask,
    )
    grad_kl = _kl_gradient(inputs, params, grad_loss)
    grad_mean = grad_logvar = None
    if mean is not None and logvar is not None:
        grad_mean, grad_logvar, _, _ = reference.sample_and_kl_backward(
            mean, logvar, None, None, None, PLAIN_SCALE, "sample", None, grad_kl
        )
    return (
        grad_recon,
        -grad_recon,
        grad_recon_logvar,
        grad_mean,
        grad_logvar,
        grad_kl if kl is not None else None,
    )
