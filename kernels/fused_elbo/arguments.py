"""From the arguments of the public functions to those of one operation: checked, broadcast to one
shape, promoted to one dtype, and with a backend chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, backends, ops
from .noise import NoiseKey, _signed64
from .parametrization import (
    PLAIN_SCALE,
    Parametrization,
    ScaleParams,
    parametrization,
    scale_params,
)
from .reference import accumulate_dtype, to_logvar
from .schemas import SAMPLE

__all__ = ["broadcast_prior", "latent_call", "resolve_noise", "variance_of"]


def latent_call(
    name: str,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    num_samples: int | None,
    key: NoiseKey | None,
    generator: torch.Generator | None,
    want_z: bool,
    reduction: int,
    backend: str | None,
    param: str | Parametrization,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z and KL of a call, each if wanted, after its arguments have been checked."""
    has_prior = prior_mean is not None or prior_logvar is not None
    scale = PLAIN_SCALE
    if has_prior or mask is not None or param != "logvar" or not _checks.are_alike(mean, logvar):
        mean = _checks.batched(name, "mean", mean)
        logvar = _checks.like(name, "logvar", logvar, "mean", mean)
        if param != "logvar":
            scale = scale_params(parametrization(name, "param", param), has_prior)
            if has_prior and prior_logvar is None and scale != PLAIN_SCALE:
                raise ValueError(
                    f'{name}: prior_logvar must be given with prior_mean when param is not "logvar"'
                )
        if mask is not None:
            mask = _checks.mask(name, mask, "mean", mean)
        if has_prior:
            prior_mean, prior_logvar = broadcast_prior(name, prior_mean, prior_logvar, mean)
            dtype = _checks.common_dtype(mean, logvar, prior_mean, prior_logvar)
            prior_mean, prior_logvar = prior_mean.to(dtype), prior_logvar.to(dtype)
            mean, logvar = mean.to(dtype), logvar.to(dtype)
        elif mean.dtype != logvar.dtype:
            dtype = torch.promote_types(mean.dtype, logvar.dtype)
            mean, logvar = mean.to(dtype), logvar.to(dtype)
    device = mean.device
    kernels = backends.select(device.type, backend)
    if key is None and num_samples is None and want_z and reduction == SAMPLE and not scale.code:
        # The commonest call; a NamedTuple of eleven costs as much as a check.
        params = ops.COMMON_PARAMS
        if scale is not PLAIN_SCALE:
            params = ops.LatentParams(clamp_min=scale.clamp_min, clamp_max=scale.clamp_max)
        if generator is not None:
            _checks.noise(name, key, generator)
        drawn = ops.draw_seed(device, generator)
        return ops.latent(kernels, mean, logvar, prior_mean, prior_logvar, drawn, params, mask)
    samples = _checks.num_samples(name, num_samples)
    if want_z:
        seed, seed_value, stream, row_offset = resolve_noise(name, key, generator, device)
    else:
        seed, seed_value, stream, row_offset = None, 0, 0, 0
    params = ops.LatentParams(
        seed_value, stream, row_offset, samples, -1, *scale, want_z, reduction
    )
    return ops.latent(kernels, mean, logvar, prior_mean, prior_logvar, seed, params, mask)


def resolve_noise(
    name: str, key: NoiseKey | None, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor | None, int, int, int]:
    """``seed, seed_value, stream, row_offset`` of a call: those of its key, or a seed drawn from
    the generator."""
    if key is None:
        if generator is not None:
            _checks.noise(name, key, generator)
        return ops.draw_seed(device, generator), 0, 0, 0
    _checks.noise(name, key, generator)
    seed = key.seed
    if isinstance(seed, Tensor):
        if seed.device != device:
            raise ValueError(
                f"{name}: key.seed must be on {device} like mean, got a tensor on {seed.device}"
            )
        return seed, 0, key.stream, key.row_offset
    return None, _signed64(seed), key.stream, key.row_offset


def broadcast_prior(
    name: str, prior_mean: Tensor | None, prior_logvar: Tensor | None, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Both parameters of a prior as views of the shape of ``mean``; the one left out is 0."""
    parameters = []
    for label, parameter in (("prior_mean", prior_mean), ("prior_logvar", prior_logvar)):
        if parameter is None:
            parameter = mean.new_zeros(())
        parameters.append(
            _checks.broadcastable(name, label, parameter, "mean", mean).expand(mean.shape)
        )
    return parameters[0], parameters[1]


def variance_of(
    name: str,
    label: str,
    logvar: Tensor | float | None,
    other_name: str,
    other: Tensor,
    scale: ScaleParams,
) -> tuple[Tensor | None, float, ScaleParams]:
    """A variance as a tensor to broadcast, or as a number, and what the kernel is to convert: a
    parameter per element. Others are converted here, where they are small."""
    if logvar is None:
        return None, 0.0, PLAIN_SCALE
    if not isinstance(logvar, Tensor):
        number = _checks.number(name, label, logvar)
        if scale == PLAIN_SCALE:
            return None, number, scale
        logvar = torch.full((), number, dtype=torch.float64, device=other.device)
        return to_logvar(logvar, scale).to(accumulate_dtype(other.dtype)), 0.0, PLAIN_SCALE
    logvar = _checks.broadcastable(name, label, logvar, other_name, other)
    if scale == PLAIN_SCALE:
        return logvar, 0.0, scale
    if logvar.numel() == other.numel() and other.dim() > 0:
        return logvar.expand(other.shape), 0.0, scale
    wide = logvar.to(accumulate_dtype(torch.promote_types(logvar.dtype, other.dtype)))
    return to_logvar(wide, scale), 0.0, PLAIN_SCALE
