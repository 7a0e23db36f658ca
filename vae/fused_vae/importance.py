"""Objectives of several samples: importance-weighted bounds and the total correlation.

Both need densities of one sample under several Gaussians. ``[B, B, latent]`` is never formed.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_elbo import DiagonalGaussian, NoiseKey, gaussian_log_likelihood

from .model import VAE
from .objectives import Objective

Estimator = Literal["iwae", "stl", "dreg"]


def importance_weighted(
    vae: VAE,
    x: Tensor,
    num_samples: int,
    *,
    estimator: Estimator = "dreg",
    key: NoiseKey | None = None,
) -> Objective:
    """Minus the bound log 1/K sum_k p(x, z_k) / q(z_k|x), and its gradient by one of three
    estimators.

    iwae: the gradient of the bound (arXiv:1509.00519); for the encoder its signal vanishes as K
    grows.
    stl: the density of q is taken at fixed parameters (arXiv:1703.09194): less variance, exact for
    K = 1, biased above.
    dreg: as stl, and the path through z is weighted once more (arXiv:1810.04152): unbiased for
    every K.

    ``elbo`` is the mean log-weight: the ELBO with the rate estimated from the samples.
    """
    log_weight, _ = log_weights(vae, x, num_samples, estimator=estimator, key=key)
    return Objective(-bound(log_weight).mean(), log_weight.detach().mean(0))


def bound(log_weight: Tensor) -> Tensor:
    """log 1/K sum_k w_k, ``[B]`` nats from ``[K, B]`` (arXiv:1509.00519)."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def log_weights(
    vae: VAE,
    x: Tensor,
    num_samples: int,
    *,
    estimator: Estimator,
    key: NoiseKey | None = None,
) -> tuple[Tensor, DiagonalGaussian]:
    """log p(x, z_k) / q(z_k|x), ``[K, B]`` nats, with the estimator's gradient; and q(z|x)."""
    if estimator not in ("iwae", "stl", "dreg"):
        raise ValueError(f"estimator must be iwae, stl or dreg, got {estimator!r}")
    q = vae.encode(x)
    z = q.rsample(num_samples, key=key)
    density = q if estimator == "iwae" else DiagonalGaussian(q.mean.detach(), q.logvar.detach())
    path = z.clone()  # what the log-weights see, so that its gradient can be weighted apart
    log_weight = vae.log_weights(x, path, density)
    if estimator == "dreg" and path.requires_grad:
        share = log_weight.detach().softmax(0)  # [K, B]
        share = share.reshape(*share.shape, *[1] * (z.dim() - 2))
        # In the type of z: under autocast that is lower than the weights'.
        path.register_hook(lambda gradient: (gradient * share).to(gradient.dtype))
    return log_weight, q


def total_correlation(
    log_likelihood: Tensor,
    q: DiagonalGaussian,
    z: Tensor,
    data_size: int,
    *,
    alpha: float = 1.0,
    beta: float = 6.0,
    gamma: float = 1.0,
) -> Objective:
    """beta-TC-VAE (arXiv:1802.04942): the rate split in three, each with its own price.

        KL = I(x; z) + KL(q(z) || prod_d q(z_d)) + sum_d KL(q(z_d) || p(z_d))

    with q(z) from the batch (minibatch-weighted sampling). At prices of 1 the three add up to log
    q(z|x) - log p(z) exactly.

    Args:
        log_likelihood: ``[B]``.
        q, z: the posteriors of the batch, and one sample of each ``[B, latent]``.
        data_size: number of training pictures.
    """
    log_posterior = q.log_prob(z)
    log_prior = gaussian_log_likelihood(z, torch.zeros_like(z))
    constant = math.log(data_size * len(z))
    log_joint = _cross(z, q.mean, q.logvar).logsumexp(1) - constant
    log_product = torch.zeros_like(log_joint)
    for columns in zip(z.T, q.mean.T, q.logvar.T):
        marginal = checkpoint(_marginal, *columns, use_reentrant=False)
        log_product = log_product + marginal - constant
    information = log_posterior - log_joint
    correlation = log_joint - log_product
    dimensions = log_product - log_prior
    rate = alpha * information + beta * correlation + gamma * dimensions
    elbo = log_likelihood - q.kl()
    return Objective((rate - log_likelihood).mean(), elbo.detach())


def _cross(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """[B, B]: log q(z_i | x_j)."""
    precision = (-logvar).exp()
    constant = (mean.square() * precision + logvar).sum(1) + mean.shape[1] * math.log(2 * math.pi)
    return -0.5 * (z.square() @ precision.T - 2 * z @ (mean * precision).T + constant)


def _marginal(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """[B]: log sum_j q(z_i | x_j) in one dimension, computed again in backward instead of kept."""
    density = (z[:, None] - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)
    return (-0.5 * density).logsumexp(1)
