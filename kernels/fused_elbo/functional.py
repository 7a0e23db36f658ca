"""The public functions: they check, choose a backend, and call one operation.

Dimension 0 is the batch ``B``; every other dimension belongs to the event. Results in nats are
float32 (float64 for float64 inputs) whatever the inputs are, so that a half-precision KL cannot
overflow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, backends, ops
from .noise import NoiseKey, _signed64
from .schemas import OFF, SAMPLE

__all__ = [
    "ELBOOutput",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "reparameterize",
    "reparameterize_kl",
]

_INFINITY = math.inf
_COMMON_PARAMS = ops.LatentParams()


class ELBOOutput(NamedTuple):
    """What `elbo_loss` returns.

    ``loss`` carries the gradient; ``log_likelihood`` and ``kl`` are per sample, ``[B]``, in nats,
    and detached.
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    num_samples: int | None = None,
    key: NoiseKey | None = None,
    generator: torch.Generator | None = None,
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
    z, kl = _latent(
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
    )
    return z, kl


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    key: NoiseKey | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """A sample ``z = mean + exp(logvar / 2) * eps`` (arXiv 1312.6114); the first half of
    `reparameterize_kl`.

    Arguments, shapes, dtypes and errors as there.

    Equivalent to::

        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    """
    return _latent(
        "reparameterize", mean, logvar, None, None, num_samples, key, generator, True, OFF, backend
    )[0]


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "sample",
    backend: str | None = None,
) -> Tensor:
    """KL(N(mean, exp(logvar)) || p) in nats; the second half of `reparameterize_kl`.

    Arguments, shapes, dtypes and errors as there.

    Equivalent to::

        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    """
    name = "gaussian_kl"
    return _latent(
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
    )[1]


def gaussian_log_likelihood(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float | None = None,
    *,
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
    logvar_tensor, logvar_value = _variance(name, "logvar", logvar, "mean", mean)
    if x.dtype != mean.dtype:
        dtype = _checks.common_dtype(x, mean)
        x, mean = x.to(dtype), mean.to(dtype)
    kernels = backends.select(mean.device.type, backend)
    return ops.likelihood(
        kernels, x, mean, logvar_tensor, ops.LikelihoodParams(logvar_value, batch_dims, code)
    )


def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mean: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    recon_logvar: Tensor | float | None = None,
    beta: Tensor | float = 1.0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> ELBOOutput:
    """The negative evidence lower bound of a VAE with a Gaussian decoder, with every gradient from
    the same pass.

    ``loss = -(log_likelihood - beta * kl)`` with ``log_likelihood = log N(x; recon_x,
    exp(recon_logvar))`` and ``kl = KL(N(mean, exp(logvar)) || N(0, I))``, both in nats and summed
    over their events (arXiv 1312.6114; beta: Higgins et al., ICLR 2017). With unit variance the
    loss is half the summed squared error plus the KL plus the constant ``N/2 * ln(2 pi)`` per
    sample: minimizing MSE is maximizing a Gaussian likelihood.

    Args:
        recon_x, x: the decoder's mean and the data, ``[B, *event]``. Different dtypes are promoted
            as torch does.
        mean, logvar: the posterior, ``[B, *latent]``, or
        kl: the KL per sample, ``[B]``, that `reparameterize_kl` has returned, instead of mean and
            logvar.
        recon_logvar: the decoder's log-variance, as ``logvar`` in `gaussian_log_likelihood`.
        beta: weight of the KL: a number, or a 0-dim tensor (read on the device; it gets no
            gradient).
        reduction: ``"batchmean"`` (mean over the batch), ``"sum"`` or ``"sample"`` (``[B]``).
        backend: as in `reparameterize_kl`.

    Returns:
        `ELBOOutput` ``(loss, log_likelihood, kl)``; the last two are ``[B]`` and detached.
        Gradients of the loss flow to recon_x, x, recon_logvar, mean, logvar and kl. When gradients
        are wanted they are computed in the forward
        pass and held until backward: one buffer the size of recon_x, and those of mean and logvar.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument. RuntimeError: the backend
            cannot run.

    Equivalent to::

        log_likelihood = -0.5 * ((recon_x - x).square() + math.log(2 * math.pi)).flatten(1).sum(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
        loss = (beta * kl - log_likelihood).mean()
    """
    name = "elbo_loss"
    code = _checks.reduction(name, reduction, ("batchmean", "sum", "sample"))
    recon_x = _checks.batched(name, "recon_x", recon_x)
    x = _checks.like(name, "x", x, "recon_x", recon_x)
    batch = recon_x.shape[0]
    if kl is not None:
        if mean is not None or logvar is not None:
            raise ValueError(f"{name}: give either mean and logvar, or kl, not both")
        kl = _checks.tensor(name, "kl", kl)
        if kl.shape != recon_x.shape[:1]:
            raise ValueError(
                f"{name}: kl must have shape ({batch},), "
                f"one value per sample as reduction='sample' gives, "
                f"got {tuple(kl.shape)}"
            )
        _checks.same_device(name, "kl", kl, "recon_x", recon_x)
    else:
        if mean is None or logvar is None:
            raise ValueError(f"{name}: give mean and logvar, or kl")
        mean = _checks.batched(name, "mean", mean)
        if mean.shape[0] != batch:
            raise ValueError(
                f"{name}: mean must have batch size {batch} like recon_x, got {mean.shape[0]}"
            )
        _checks.same_device(name, "mean", mean, "recon_x", recon_x)
        logvar = _checks.like(name, "logvar", logvar, "mean", mean)
    variance, variance_value = _variance(name, "recon_logvar", recon_logvar, "recon_x", recon_x)
    beta_tensor, beta_value = None, 1.0
    if isinstance(beta, Tensor):
        if beta.dim() != 0:
            raise ValueError(
                f"{name}: beta must be a number or a 0-dim tensor, got shape {tuple(beta.shape)}"
            )
        _checks.same_device(name, "beta", _checks.tensor(name, "beta", beta), "recon_x", recon_x)
        beta_tensor = beta.detach()
    else:
        beta_value = _checks.number(name, "beta", beta)

    dtype = _checks.common_dtype(recon_x, x)
    latent_dtype = dtype if mean is None else _checks.common_dtype(mean, logvar)
    if torch.float64 in (dtype, latent_dtype):  # one dtype for everything in nats
        dtype = latent_dtype = torch.float64
    nats = torch.float64 if dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling() and beta_value != 1.0:
        # Numbers are constants of a graph, so that annealing one would compile at every step; only
        # one that multiplies a tensor may change.
        beta_tensor, beta_value = recon_x.new_ones((), dtype=nats) * beta_value, 1.0
    inputs = ops.ELBOInputs(
        recon_x.to(dtype),
        x.to(dtype),
        variance,
        None if mean is None else mean.to(latent_dtype),
        None if logvar is None else logvar.to(latent_dtype),
        None if kl is None else kl.to(nats),
        None if beta_tensor is None else beta_tensor.to(nats),
    )
    kernels = backends.select(recon_x.device.type, backend)
    return ELBOOutput(*ops.elbo(kernels, inputs, ops.ELBOParams(variance_value, beta_value, code)))


def _latent(
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
) -> tuple[Tensor, Tensor]:
    mean = _checks.batched(name, "mean", mean)
    logvar = _checks.like(name, "logvar", logvar, "mean", mean)
    if prior_mean is not None or prior_logvar is not None:
        prior_mean, prior_logvar = broadcast_prior(name, prior_mean, prior_logvar, mean)
        dtype = _checks.common_dtype(mean, logvar, prior_mean, prior_logvar)
        prior_mean, prior_logvar = prior_mean.to(dtype), prior_logvar.to(dtype)
        mean, logvar = mean.to(dtype), logvar.to(dtype)
    elif mean.dtype != logvar.dtype:
        dtype = torch.promote_types(mean.dtype, logvar.dtype)
        mean, logvar = mean.to(dtype), logvar.to(dtype)
    kernels = backends.select(mean.device.type, backend)
    if num_samples is None and key is None and want_z and reduction == SAMPLE:
        # The commonest call; a NamedTuple of nine costs as much as a check.
        seed, _, _, _ = resolve_noise(name, key, generator, mean.device)
        return ops.latent(kernels, mean, logvar, prior_mean, prior_logvar, seed, _COMMON_PARAMS)
    samples = _checks.num_samples(name, num_samples)
    if want_z:
        seed, seed_value, stream, row_offset = resolve_noise(name, key, generator, mean.device)
    else:
        seed, seed_value, stream, row_offset = None, 0, 0, 0
    params = ops.LatentParams(
        seed_value, stream, row_offset, samples, -1, -_INFINITY, _INFINITY, want_z, reduction
    )
    return ops.latent(kernels, mean, logvar, prior_mean, prior_logvar, seed, params)


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


def _variance(
    name: str, label: str, logvar: Tensor | float | None, other_name: str, other: Tensor
) -> tuple[Tensor | None, float]:
    """A variance as a tensor to broadcast, or as a number."""
    if logvar is None:
        return None, 0.0
    if isinstance(logvar, Tensor):
        return _checks.broadcastable(name, label, logvar, other_name, other), 0.0
    return None, _checks.number(name, label, logvar)
