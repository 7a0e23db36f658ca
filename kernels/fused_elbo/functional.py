"""The public functions: they check, choose a backend, and call one operation.

Dimension 0 is the batch ``B``; every other dimension belongs to the event. Results in nats are
float32 (float64 for float64 inputs) whatever the inputs are, so that a half-precision KL cannot
overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, backends, fastpath, ops
from .arguments import latent_call, variance_of
from .loss import ELBOOutput, elbo_loss
from .noise import NoiseKey
from .parametrization import PLAIN_SCALE, Parametrization, parametrization, scale_params
from .schemas import OFF

__all__ = [
    "ELBOOutput",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "reparameterize",
    "reparameterize_kl",
]


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
    if (
        key is None
        and generator is None
        and num_samples is None
        and mask is None
        and backend is None
        and param == "logvar"
        and not torch.compiler.is_compiling()
    ):
        done = fastpath.reparameterize_kl(mean, logvar, prior_mean, prior_logvar, reduction)
        if done is not None:
            return done
    name = "reparameterize_kl"
    return latent_call(
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
    if (
        key is None
        and generator is None
        and num_samples is None
        and mask is None
        and backend is None
        and param == "logvar"
        and not torch.compiler.is_compiling()
    ):
        done = fastpath.reparameterize_kl(mean, logvar, None, None, None)
        if done is not None:
            return done[0]
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
    if mask is None and backend is None and param == "logvar" and not torch.compiler.is_compiling():
        done = fastpath.gaussian_kl(mean, logvar, prior_mean, prior_logvar, reduction)
        if done is not None:
            return done
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
            Leave a small one small: expanded to the full shape, it is copied for its gradient.
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
    if mask is None and backend is None and param == "logvar" and not torch.compiler.is_compiling():
        done = fastpath.gaussian_log_likelihood(x, mean, logvar, reduction)
        if done is not None:
            return done
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
