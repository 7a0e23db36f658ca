"""The lines that users write: what the package replaces, and what torch.compile is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def _sum_events(nats: Tensor, batch_dims: int = 1) -> Tensor:
    return nats.flatten(batch_dims).sum(-1)


def sample_and_kl(mean: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """arXiv 1312.6114, as in the tutorials."""
    std = torch.exp(0.5 * logvar)
    eps = (
        torch.randn((samples, *mean.shape), dtype=mean.dtype, device=mean.device)
        if samples
        else torch.randn_like(std)
    )
    z = mean + std * eps
    kl = -0.5 * _sum_events(1 + logvar - mean.square() - logvar.exp())
    return z, kl


def sample_and_kl_to_prior(
    mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor
) -> tuple[Tensor, Tensor]:
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    var_ratio = torch.exp(logvar - prior_logvar)
    distance = (mean - prior_mean).square() * torch.exp(-prior_logvar)
    return z, 0.5 * _sum_events(var_ratio + distance - 1 - (logvar - prior_logvar))


def moments(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """What diffusers' DiagonalGaussianDistribution computes, sample() and kl()."""
    mean, logvar = parameters.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    z = mean + std * torch.randn_like(std)
    return z, 0.5 * _sum_events(mean.square() + var - 1.0 - logvar)


def log_likelihood(x: Tensor, mean: Tensor, logvar: Tensor | None, batch_dims: int) -> Tensor:
    residual = x - mean
    if logvar is None:
        return -0.5 * _sum_events(residual.square() + LOG_2PI, batch_dims)
    nats = residual.square() * torch.exp(-logvar) + logvar + LOG_2PI
    return -0.5 * _sum_events(nats, batch_dims)


def elbo(recon: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The negative ELBO, unit variance, mean over the batch."""
    ll = log_likelihood(x, recon, None, 1)
    kl = -0.5 * _sum_events(1 + logvar - mean.square() - logvar.exp())
    return (kl - ll).mean()
