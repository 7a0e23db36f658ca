"""The arguments of sampling, KL and likelihood, and what these compute in plain PyTorch.

A call is made of tensors and of parameters that are none. Each has a plain form, `reference` behind
the signature of the raw operation: the `reference` backend runs it, and double backward and forward
mode differentiate it. `elbo_call` has the same for the ELBO.
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
        return ScaleParams(self.scale, self.floor, self.clamp_min, self.clamp_max)


#: Those of the commonest call; after seed_value they are the defaults of the schemas.
COMMON_PARAMS = LatentParams()
_COMMON = COMMON_PARAMS[1:]


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
    if params is COMMON_PARAMS and mask is None:
        return kernels.latent_forward(mean, logvar, prior_mean, prior_logvar, seed)
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
    if params is COMMON_PARAMS and mask is None and not want_prior:
        return kernels.latent_backward(
            mean, logvar, prior_mean, prior_logvar, grad_z, grad_kl, seed
        )
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
        return ScaleParams(self.scale, self.floor, self.clamp_min, self.clamp_max)

    def raw(self) -> tuple[Any, ...]:
        """As the raw operations take them: what they have as defaults costs nothing left out."""
        if self.parametrization != PLAIN_SCALE:
            return self
        return self.logvar_value, self.batch_dims, self.reduction


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
