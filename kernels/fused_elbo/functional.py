"""The public functions: they check, choose a backend, and call one operation.

Dimension 0 is the batch ``B``; every other dimension belongs to the event. Results in nats are
float32 (float64 for float64 inputs) whatever the inputs are, so that a half-precision KL cannot
overflow.
"""

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
from .schemas import OFF, SAMPLE

__all__ = [
    "gaussian_kl",
    "gaussian_log_likelihood",
    "reparameterize",
    "reparameterize_kl",
]

_COMMON_PARAMS = ops.LatentParams()


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    num_samples: int | None = None,
    key: NoiseKey | None = None,
    generator: torch.Generator | None = None,
    param: str | Parametrization = "logvar",
    mask: Tensor | None = None,
    reduction: str = "sample",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample z ~ q = N(mean, exp(logvar)) and KL(q || p), in one kernel.

    ``z = mean + exp(logvar / 2) * eps`` (Kingma and Welling, arXiv 1312.6114) and, summed over the
    event, ``KL = 1/2 * sum(phi(logvar - prior_logvar) + (mean - prior_mean)**2 *
    exp(-prior_logvar))`` in nats, with ``phi(x) = exp(x) - 1 - x`` computed without cancellation.
    Backward regenerates eps: nothing but the inputs and the seed is saved.

    Args:
        mean, logvar: ``[B, *event]``, same shape; float32, float64, bfloat16 or float16. Row
            slices, chunks of the channel dimension, channels_last and expanded tensors are read in
            place; layouts with more than four incompatible event dimensions are copied first.
        prior_mean, prior_logvar: the prior p; anything that broadcasts to the shape of ``mean``.
            Left out: N(0, I); only one of them given: the other is 0. Gradients flow to both.
        num_samples: K draws K samples per row; z then has shape ``[K, B, *event]``.
        key: the noise to draw. Default: one seed drawn from ``generator``.
        generator: default: torch's generator of the device, so that ``torch.manual_seed``
            reproduces.
        param: what ``logvar`` and ``prior_logvar`` hold: ``"logvar"``, ``"logstd"``,
            ``"softplus_std"``, ``"var"``, or a `Parametrization` with a floor or a clamp.
        mask: bool, broadcasts to the shape of ``mean``. Where it is False z is 0, the KL is 0 and
            no gradient flows, even if an input holds NaN there. Means are over the whole batch.
        reduction: of the KL: ``"sample"`` (``[B]``), ``"none"`` (``[B, *event]``), ``"batchmean"``
            (sum over events, mean over the batch) or ``"sum"``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; default: by device.

    Returns:
        ``(z, kl)``: z has the dtype and layout of ``mean``; kl is float32 (float64 for float64).

    Raises:
        TypeError, ValueError: before anything runs, naming the argument. RuntimeError: the backend
            cannot run.

    Equivalent to::

        std = torch.exp(0.5 * logvar)
        z = mean + std * torch.randn_like(std)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).flatten(1).sum(1)
    """
    name = "reparameterize_kl"
    z, kl = latent_call(
        name,
        mean,
        logvar,
        prior_mean,
        prior_logvar,
        num_samples,
        key,
        generator,
        True,
        _checks.reduction(name, reduction),
        backend,
        param,
        mask,
    )
    return z, kl


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    key: NoiseKey | None = None,
    generator: torch.Generator | None = None,
    param: str | Parametrization = "logvar",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A sample ``z = mean + exp(logvar / 2) * eps`` (arXiv 1312.6114); the first half of
    `reparameterize_kl`.

    Arguments, shapes, dtypes and errors as there.

    Equivalent to::

        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    """
    return latent_call(
        "reparameterize",
        mean,
        logvar,
        None,
        None,
        num_samples,
        key,
        generator,
        True,
        OFF,
        backend,
        param,
        mask,
    )[0]


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    param: str | Parametrization = "logvar",
    mask: Tensor | None = None,
    reduction: str = "sample",
    backend: str | None = None,
) -> Tensor:
    """KL(N(mean, exp(logvar)) || p) in nats; the second half of `reparameterize_kl`.

    Arguments, shapes, dtypes and errors as there.

    Equivalent to::

        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    """
    name = "gaussian_kl"
    return latent_call(
        name,
        mean,
        logvar,
        prior_mean,
        prior_logvar,
        None,
        None,
        None,
        False,
        _checks.reduction(name, reduction),
        backend,
        param,
        mask,
    )[1]


def gaussian_log_likelihood(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float | None = None,
    *,
    param: str | Parametrization = "logvar",
    mask: Tensor | None = None,
    reduction: str = "sample",
    backend: str | None = None,
) -> Tensor:
    """log N(x; mean, exp(logvar)) in nats, with the constant.

    ``-1/2 * sum((x - mean)**2 * exp(-logvar) + logvar + ln(2 pi))``.

    Args:
        x, mean: ``[B, *event]``; one of them may have a leading sample dimension, ``[K, B,
            *event]``, over which the other is broadcast. Different dtypes are promoted as torch
            does.
        logvar: None (unit variance), a number, a 0-dim tensor (one learned variance), or any shape
            that broadcasts to that of ``mean``: per channel ``[C, 1, 1]``, per pixel, or full.
        param: what ``logvar`` holds, as in `reparameterize_kl`. Only a full one is converted in the
            kernel; a smaller one before it, in PyTorch.
        mask: bool, broadcasts to the shape of ``mean``. Where it is False the log-likelihood is 0
            and no gradient flows, even if an input holds NaN there.
        reduction: ``"sample"`` (``[B]``, or ``[K, B]``), ``"none"``, ``"batchmean"`` or ``"sum"``.
        backend: as in `reparameterize_kl`.

    Returns:
        float32 (float64 for float64). Gradients flow to x, mean and logvar.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument. RuntimeError: the backend
            cannot run.

    Equivalent to::

        ll = torch.distributions.Normal(mean, torch.exp(0.5 * logvar)).log_prob(x).flatten(1).sum(1)
    """
    name = "gaussian_log_likelihood"
    code = _checks.reduction(name, reduction)
    mean = _checks.batched(name, "mean", mean)
    x = _checks.batched(name, "x", x)
    if x.shape != mean.shape:
        if x.dim() + 1 == mean.dim() and x.shape == mean.shape[1:]:
            x, batch_dims = x.expand(mean.shape), 2
        elif mean.dim() + 1 == x.dim() and mean.shape == x.shape[1:]:
            mean, batch_dims = mean.expand(x.shape), 2
        else:
            raise ValueError(
                f"{name}: x must have shape {tuple(mean.shape)} like mean "
                f"(one of them may have a leading sample "
                f"dimension more), got {tuple(x.shape)}"
            )
    else:
        batch_dims = 1
    _checks.same_device(name, "x", x, "mean", mean)
    scale = PLAIN_SCALE
    if param != "logvar":
        scale = scale_params(parametrization(name, "param", param), True)
    logvar_tensor, logvar_value, scale = variance_of(name, "logvar", logvar, "mean", mean, scale)
    if mask is not None:
        mask = _checks.mask(name, mask, "mean", mean)
    if x.dtype != mean.dtype:
        dtype = _checks.common_dtype(x, mean)
        x, mean = x.to(dtype), mean.to(dtype)
    kernels = backends.select(mean.device.type, backend)
    params = ops.LikelihoodParams(logvar_value, batch_dims, code, *scale)
    return ops.likelihood(kernels, x, mean, logvar_tensor, params, mask)


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
    mean = _checks.batched(name, "mean", mean)
    logvar = _checks.like(name, "logvar", logvar, "mean", mean)
    has_prior = prior_mean is not None or prior_logvar is not None
    scale = PLAIN_SCALE
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
    kernels = backends.select(mean.device.type, backend)
    if num_samples is None and key is None and want_z and reduction == SAMPLE and not scale.code:
        # The commonest call; a NamedTuple of eleven costs as much as a check.
        params = _COMMON_PARAMS
        if scale is not PLAIN_SCALE:
            params = ops.LatentParams(clamp_min=scale.clamp_min, clamp_max=scale.clamp_max)
        seed, _, _, _ = resolve_noise(name, key, generator, mean.device)
        return ops.latent(kernels, mean, logvar, prior_mean, prior_logvar, seed, params, mask)
    samples = _checks.num_samples(name, num_samples)
    if want_z:
        seed, seed_value, stream, row_offset = resolve_noise(name, key, generator, mean.device)
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
