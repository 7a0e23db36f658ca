"""The arguments of a call, and what it computes in plain PyTorch.

A call is made of tensors and of parameters that are none. Each has a plain form, `reference` behind
the signature of the
raw operation: the `reference` backend runs it, and double backward and forward mode differentiate
    it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .noise import NoiseKey
from .parametrization import PLAIN_SCALE, ScaleParams
from .schemas import OFF, REDUCTIONS, SAMPLE, halves

REDUCTION_NAMES = {code: name for name, code in REDUCTIONS.items()}


class Kernels(NamedTuple):
    """The raw operations of one namespace, and how `elbo` turns its saved gradients into those of a
    backward pass."""

    namespace: str
    latent_forward: Callable[..., tuple[Tensor, Tensor]]
    latent_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    likelihood_forward: Callable[..., Tensor]
    likelihood_backward: Callable[..., tuple[Tensor, Tensor]]
    elbo_forward: Callable[..., tuple[Tensor, ...]]
    fold_seed: Callable[..., Tensor]
    noise_words: Callable[..., Tensor]
    elbo_backward: Callable[..., tuple[Tensor | None, ...]]


class TracedKernels(NamedTuple):
    """What stands for `Kernels` while torch.compile traces: operations are looked up by name, which
    leaves no guards."""

    namespace: str


def present(grads: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if want else None for g, want in zip(grads, wanted))


# sampling and KL


class LatentParams(NamedTuple):
    """The arguments of `latent_forward` that are not tensors, in its order."""

    seed_value: int = 0
    stream: int = 0
    row_offset: int = 0
    num_samples: int = 0
    chunk_dim: int = -1
    scale: int = 0
    floor: float = 0.0
    clamp_min: float = -math.inf
    clamp_max: float = math.inf
    want_z: bool = True
    reduction: int = SAMPLE

    @property
    def parametrization(self) -> ScaleParams:
        return ScaleParams(*self[5:9])


# The parameters after seed_value of the commonest call, which the schemas have as defaults.
_COMMON = LatentParams()[1:]


def latent_forward_raw(
    kernels: Kernels,
    params: LatentParams,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """z and KL from the kernels, without gradients."""
    if params[1:] == _COMMON:
        return kernels.latent_forward(mean, logvar, prior_mean, prior_logvar, seed, mask, params[0])
    return kernels.latent_forward(mean, logvar, prior_mean, prior_logvar, seed, mask, *params)


def latent_backward_raw(
    kernels: Kernels,
    params: LatentParams,
    inputs: tuple[Any, ...],
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    want_prior: bool,
) -> tuple[Tensor, ...]:
    """The gradients of a call; ``inputs`` are the tensors that its forward pass was given."""
    mean, logvar, prior_mean, prior_logvar, seed, mask = inputs
    if params[1:] == _COMMON and not want_prior:
        return kernels.latent_backward(
            mean, logvar, prior_mean, prior_logvar, grad_z, grad_kl, seed, mask, params[0]
        )
    *noise_and_scale, want_z, reduction = params
    return kernels.latent_backward(
        mean,
        logvar,
        prior_mean,
        prior_logvar,
        grad_z if want_z else None,
        grad_kl if reduction != OFF else None,
        seed,
        mask,
        *noise_and_scale,
        reduction,
        want_prior,
    )


def latent_plain(
    kernels: Kernels | None,
    params: LatentParams,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the kernels compute, in differentiable PyTorch."""
    mean, log_variance = halves(mean, logvar, params.chunk_dim)
    eps = _noise(kernels, params, mean, seed) if params.want_z else None
    z, kl = reference.sample_and_kl(
        mean,
        log_variance,
        prior_mean,
        prior_logvar,
        eps,
        params.parametrization,
        REDUCTION_NAMES.get(params.reduction),
        mask,
    )
    return mean.new_empty(0) if z is None else z, mean.new_empty(0) if kl is None else kl


def latent_backward_plain(
    kernels: Kernels | None,
    params: LatentParams,
    inputs: tuple[Any, ...],
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
) -> tuple[Tensor, ...]:
    """What `latent_backward` computes, in differentiable PyTorch."""
    mean, logvar, prior_mean, prior_logvar, seed, mask = inputs
    half, log_variance = halves(mean, logvar, params.chunk_dim)
    grad_mean, grad_logvar, *grad_priors = reference.sample_and_kl_backward(
        half,
        log_variance,
        prior_mean,
        prior_logvar,
        _noise(kernels, params, half, seed) if params.want_z and grad_z is not None else None,
        params.parametrization,
        REDUCTION_NAMES.get(params.reduction),
        grad_z if params.want_z else None,
        grad_kl,
        mask,
    )
    empty = mean.new_empty(0)
    priors = tuple(empty if g is None else g for g in grad_priors)
    if logvar is None:
        return torch.cat((grad_mean, grad_logvar), params.chunk_dim), empty, *priors
    return grad_mean, grad_logvar, *priors


def _noise(
    kernels: Kernels | None, params: LatentParams, mean: Tensor, seed: Tensor | None
) -> Tensor:
    """The normals of a call: with mean 0 and logvar 0, z is the noise itself."""
    if kernels is None:
        key = NoiseKey(
            params.seed_value if seed is None else seed, params.stream, params.row_offset
        )
        return reference.normals(key, mean.shape, mean.dtype, params.num_samples, mean.device)
    zeros = torch.zeros(
        (), dtype=reference.accumulate_dtype(mean.dtype), device=mean.device
    ).expand(mean.shape)
    only_z = LatentParams(*params[:4], want_z=True, reduction=OFF)
    return kernels.latent_forward(zeros, zeros, None, None, seed, None, *only_z)[0]


# likelihood


class LikelihoodParams(NamedTuple):
    """The arguments of `likelihood_forward` that are not tensors, in its order."""

    logvar_value: float = 0.0
    batch_dims: int = 1
    reduction: int = SAMPLE
    scale: int = 0
    floor: float = 0.0
    clamp_min: float = -math.inf
    clamp_max: float = math.inf

    @property
    def parametrization(self) -> ScaleParams:
        return ScaleParams(*self[3:])

    def raw(self) -> tuple[Any, ...]:
        """As the raw operations take them: what they have as defaults costs nothing left out."""
        return self[:3] if self[3:] == PLAIN_SCALE else self


def likelihood_plain(
    params: LikelihoodParams,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    return reference.log_likelihood(
        x,
        mean,
        params.logvar_value if logvar is None else logvar,
        params.batch_dims,
        REDUCTION_NAMES[params.reduction],
        params.parametrization,
        mask,
    )


def likelihood_backward_raw(
    kernels: Kernels,
    params: LikelihoodParams,
    inputs: tuple[Any, ...],
    grad: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients for x, mean and logvar that are wanted."""
    x, mean, logvar, mask = inputs
    want_x, want_mean, want_logvar = wanted
    grad_mean, grad_logvar = kernels.likelihood_backward(
        x, mean, logvar, grad, want_x or want_mean, want_logvar, mask, *params.raw()
    )
    return likelihood_gradients(grad_mean, grad_logvar, wanted)


def likelihood_gradients(
    grad_mean: Tensor, grad_logvar: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those for x, mean and logvar; that for x is minus that for mean."""
    want_x, want_mean, want_logvar = wanted
    return (
        -grad_mean if want_x else None,
        grad_mean if want_mean else None,
        grad_logvar if want_logvar else None,
    )


def likelihood_backward_plain(
    params: LikelihoodParams,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    mask: Tensor | None,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_mean, grad_logvar = reference.log_likelihood_backward(
        x,
        mean,
        params.logvar_value if logvar is None else logvar,
        params.batch_dims,
        REDUCTION_NAMES[params.reduction],
        grad,
        params.parametrization,
        mask,
    )
    return grad_mean, mean.new_empty(0) if logvar is None else grad_logvar


# ELBO


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

    def scale(grad: Tensor, want: bool) -> Tensor | None:
        if not want:
            return None
        if grad_loss.dim() == 0:
            return grad * grad_loss
        if grad.dim() == 0 or grad.shape[0] != grad_loss.shape[0]:
            raise AssertionError(
                "a gradient summed over the batch has no per-sample upstream gradient"
            )
        return grad * grad_loss.view(-1, *(1,) * (grad.dim() - 1)).to(grad.dtype)

    recon_logvar_summed = inputs.recon_logvar is not None and needed[2] and grad_loss.dim() == 1
    if recon_logvar_summed:
        # Summing over the batch came before scaling: redo this one gradient with the upstream
        # gradient known.
        _, _, recon_logvar, *_ = elbo_backward_plain(inputs, params, grad_loss)
    elif _is_one(grad_loss):
        scale = lambda grad, want: grad if want else None  # noqa: E731
    grad_recon = scale(saved[0], needed[0] or needed[1])
    return (
        grad_recon if needed[0] else None,
        -grad_recon if needed[1] and grad_recon is not None else None,
        recon_logvar if recon_logvar_summed else scale(saved[1], needed[2]),
        scale(saved[2], needed[3]),
        scale(saved[3], needed[4]),
        _elbo_kl_gradient(inputs, params, grad_loss) if needed[5] else None,
    )


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


def _elbo_kl_gradient(inputs: ELBOInputs, params: ELBOParams, grad_loss: Tensor) -> Tensor:
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
    grad_kl = _elbo_kl_gradient(inputs, params, grad_loss)
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
