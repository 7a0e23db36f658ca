"""Training objectives on the per-sample parts that the fused operations return.

Each returns what is optimized beside the ELBO that it changes, so that runs with different
objectives stay comparable: ``loss`` carries the gradient, ``elbo`` is untouched, per sample and
detached. Rates and log-likelihoods are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fused_elbo import gaussian_log_likelihood


class Objective(NamedTuple):
    """What is optimized, and what is logged."""

    loss: Tensor  # []
    elbo: Tensor  # [B], detached


def _objective(loss: Tensor, log_likelihood: Tensor, kl: Tensor) -> Objective:
    return Objective(loss, (log_likelihood - kl).detach())


def weighted(log_likelihood: Tensor, kl: Tensor, beta: float | Tensor = 1.0) -> Objective:
    """-log p(x|z) + beta KL, the ELBO at beta = 1 (beta-VAE: Higgins et al., ICLR 2017)."""
    return _objective((beta * kl - log_likelihood).mean(), log_likelihood, kl)


def linear_warm_up(step: int, steps: int) -> float:
    """Beta from 0 to 1 over so many steps (arXiv:1511.06349)."""
    return min(1.0, step / steps)


def cosine_warm_up(step: int, steps: int) -> float:
    """Beta from 0 to 1 along half a cosine: no kink at either end."""
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, step / steps))


def cyclical_warm_up(step: int, period: int, rise: float = 0.5) -> float:
    """Beta from 0 to 1 in the first share `rise` of every period, then 1 (arXiv:1903.10145)."""
    return min(1.0, step % period / (rise * period))


def free_bits(
    log_likelihood: Tensor,
    kl: Sequence[Tensor],
    floor: float,
    *,
    order: Literal["mean_first", "clamp_first"] = "mean_first",
) -> Objective:
    """Rate below ``floor`` nats per group is free (arXiv:1606.04934, appendix C.8).

    mean_first: sum_g max(floor, mean_B KL_g), as published: one picture may use less if others use
    more.
    clamp_first: mean_B sum_g max(floor, KL_g), which frees every picture by itself.

    Args:
        log_likelihood: ``[B]``.
        kl: of each group ``[B]``: a layer, or a dimension (``kl_elementwise.unbind(1)``).
        floor: nats per group.
    """
    groups = torch.stack(list(kl))  # [G, B]
    if order == "mean_first":
        rate = groups.mean(1).clamp(min=floor).sum()
    elif order == "clamp_first":
        rate = groups.clamp(min=floor).sum(0).mean()
    else:
        raise ValueError(f"free_bits: order must be mean_first or clamp_first, got {order!r}")
    return _objective(rate - log_likelihood.mean(), log_likelihood, groups.sum(0))


@dataclass
class SoftFreeBits:
    """Lower the price of the rate while it is under the floor, raise it while above
    (arXiv:1611.02731).

    The price keeps its gradient everywhere, where free bits have none under the floor.
    """

    floor: float  # nats
    price: float = 1.0
    step: float = 0.1  # the price changes by this share
    tolerance: float = 0.05  # above floor * (1 + tolerance) the price rises
    least: float = 1e-4

    def __call__(self, log_likelihood: Tensor, kl: Tensor) -> Objective:
        """Weight the KL by the present price, then adapt it."""
        objective = weighted(log_likelihood, kl, self.price)
        rate = float(kl.detach().mean())
        if rate < self.floor:
            self.price = max(self.least, self.price / (1 + self.step))
        elif rate > self.floor * (1 + self.tolerance):
            self.price = min(1.0, self.price * (1 + self.step))
        return objective


def capacity(
    log_likelihood: Tensor, kl: Tensor, target: float | Tensor, weight: float = 1000.0
) -> Objective:
    """-log p(x|z) + weight |KL - target|: a rate given in nats, usually raised in training
    (arXiv:1804.03599).
    """
    loss = (weight * (kl - target).abs() - log_likelihood).mean()
    return _objective(loss, log_likelihood, kl)


@dataclass
class GECO:
    """The least rate whose distortion is at most ``target`` nats: KL + multiplier (distortion -
    target) (arXiv:1810.00597).

    The multiplier follows the moving average of the constraint, exp(speed * constraint) per step.
    """

    target: float  # nats of distortion per sample
    multiplier: float = 1.0
    speed: float = 1e-2
    decay: float = 0.99
    average: float | None = None

    def __call__(self, log_likelihood: Tensor, kl: Tensor) -> Objective:
        """The Lagrangian at the present multiplier; then moves the multiplier."""
        constraint = (-log_likelihood - self.target).mean()
        now = float(constraint.detach())
        last = now if self.average is None else self.average
        self.average = self.decay * last + (1 - self.decay) * now
        # The value is the moving average, the gradient that of this batch.
        smooth = constraint + (self.average - constraint.detach())
        loss = kl.mean() + self.multiplier * smooth
        exponent = max(-1.0, min(1.0, self.speed * self.average))
        self.multiplier = min(1e6, max(1e-6, self.multiplier * math.exp(exponent)))
        return _objective(loss, log_likelihood, kl)


def balanced(
    log_likelihood: Tensor, kl: Sequence[Tensor], sizes: Sequence[int], beta: float
) -> Objective:
    """Price layers in proportion to what they use while warming up (NVAE, arXiv:2007.03898,
    appendix A; DVAE++, arXiv:1802.04920, appendix H).

        weight_l = L (mean_B KL_l / size_l) / sum_i (mean_B KL_i / size_i),    held fixed

    so that their mean is 1; at beta = 1 all weights are 1. A layer whose dimensions carry little
    pays little, and so is not switched off before it has learned anything. NVAE's text multiplies
    by the size where its code, and DVAE++, divide by it; its authors call the text a misprint
    (https://github.com/NVlabs/NVAE/issues/26), and this divides.

    Args:
        log_likelihood: ``[B]``.
        kl: of each layer ``[B]``.
        sizes: dimensions of each layer.
        beta: of the whole rate.
    """
    layers = torch.stack(list(kl))
    if beta < 1:
        used = layers.detach().mean(1) / layers.new_tensor(sizes)
        weights = len(layers) * used / used.sum().clamp(min=torch.finfo(used.dtype).tiny)
    else:
        weights = torch.ones_like(layers[:, 0])
    rate = (weights[:, None] * layers).sum(0)
    return _objective((beta * rate - log_likelihood).mean(), log_likelihood, layers.sum(0))


def optimal_sigma(x: Tensor, mean: Tensor, kl: Tensor) -> Objective:
    """The ELBO at the best shared variance of the batch, its mean squared error
    (arXiv:2006.13202).
    """
    squared_error = (x - mean).square().flatten(1).sum(1)
    return optimal_variance(squared_error, x[0].numel(), kl)


def optimal_variance(squared_error: Tensor, size: int, kl: Tensor) -> Objective:
    """`optimal_sigma` of squared errors ``[B]``, each the sum over `size` pixels.

    The variance is held fixed; the gradient is still that of size / 2 * log(mean squared error),
    whose derivative it is.
    """
    variance = squared_error.detach().mean() / size
    constant = size * (variance.log() + math.log(2 * math.pi))
    return weighted(-0.5 * (squared_error / variance + constant), kl)


def beta_nll(x: Tensor, mean: Tensor, logvar: Tensor, kl: Tensor, power: float = 0.5) -> Objective:
    """Each pixel's log-likelihood weighted by its variance^power, held fixed (arXiv:2203.09168).

    power 0 is the likelihood; at 1 the mean has the gradient of the squared error, so that a pixel
    with a large predicted variance is not given up.
    """
    pixels = gaussian_log_likelihood(x, mean, logvar, reduction="none")
    weight = (power * logvar.detach()).exp().expand_as(pixels)
    weighted_pixels = (weight * pixels).flatten(1).sum(1)
    loss = (kl - weighted_pixels).mean()
    return _objective(loss, pixels.flatten(1).sum(1), kl)


def info_vae(
    log_likelihood: Tensor,
    kl: Tensor,
    z: Tensor,
    prior: Tensor,
    *,
    alpha: float = 0.0,
    weight: float = 1000.0,
) -> Objective:
    """-log p(x|z) + (1 - alpha) KL + (alpha + weight - 1) MMD(q(z), p(z)) (InfoVAE,
    arXiv:1706.02262).

    Args:
        z: ``[B, latent]``, samples of the posteriors, with gradient.
        prior: ``[M, latent]``, samples of the prior.
    """
    loss = (1 - alpha) * kl.mean() - log_likelihood.mean()
    loss = loss + (alpha + weight - 1) * maximum_mean_discrepancy(z, prior)
    return _objective(loss, log_likelihood, kl)


def maximum_mean_discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """Squared MMD with the kernel exp(-|x - y|^2 / latent), biased estimate: never negative."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / x.shape[1]).exp().mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
