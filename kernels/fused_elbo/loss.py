"""The loss of a VAE: log-likelihood, KL and every gradient from one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, backends, fastpath, ops
from .arguments import latent_call, variance_of
from .parametrization import PLAIN_SCALE, Parametrization, parametrization, scale_params
from .schemas import SAMPLE

__all__ = ["ELBOOutput", "elbo_loss"]


class ELBOOutput(NamedTuple):
    """What `elbo_loss` returns.

    ``loss`` carries the gradient; ``log_likelihood`` and ``kl`` are per sample, ``[B]``, in nats,
    and detached.
    """

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mean: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    recon_logvar: Tensor | float | None = None,
    beta: Tensor | float = 1.0,
    param: str | Parametrization = "logvar",
    recon_param: str | Parametrization = "logvar",
    mask: Tensor | None = None,
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
        param: what ``logvar`` holds, as in `reparameterize_kl`; another than ``"logvar"`` takes a
            launch of its own for the KL.
        recon_param: what ``recon_logvar`` holds, as ``param`` in `gaussian_log_likelihood`.
        mask: bool, broadcasts to the shape of ``recon_x``: elements that are False take no part in
            the log-likelihood, even if they hold NaN. A latent's own mask goes to
            `reparameterize_kl`, whose ``kl`` is then given here.
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
    if (
        mask is None
        and backend is None
        and param == recon_param == "logvar"
        and not torch.compiler.is_compiling()
    ):
        done = fastpath.elbo_loss(recon_x, x, mean, logvar, kl, recon_logvar, beta, reduction)
        if done is not None:
            return ELBOOutput(*done)
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
    recon_scale = PLAIN_SCALE
    if recon_param != "logvar":
        recon_scale = scale_params(parametrization(name, "recon_param", recon_param), True)
    variance, variance_value, recon_scale = variance_of(
        name, "recon_logvar", recon_logvar, "recon_x", recon_x, recon_scale
    )
    if mask is not None:
        mask = _checks.mask(name, mask, "recon_x", recon_x)
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

    if param != "logvar":
        posterior = parametrization(name, "param", param)
        if kl is None and posterior != Parametrization():
            assert mean is not None and logvar is not None
            kl = latent_call(
                name, mean, logvar, None, None, None, None, None, False, SAMPLE, backend, posterior
            )[1]
            mean = logvar = None
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
        mask,
    )
    kernels = backends.select(recon_x.device.type, backend)
    params = ops.ELBOParams(variance_value, beta_value, code, recon_scale)
    return ELBOOutput(*ops.elbo(kernels, inputs, params))
