"""What a trained VAE knows about its pictures, in nats and in shares.

    E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))        (Hoffman & Johnson, 2016)

Everything here takes posteriors and tensors, not models, so that it can be checked against
Gaussians whose mutual information is known. Sums run in float64: log-densities of a sharp posterior
at another's sample reach -10^5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_elbo import DiagonalGaussian

ACTIVE_VARIANCE = 0.01
"""An active latent dimension: its posterior mean varies by more over x (arXiv:1509.00519)."""


def cross_log_density(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log q(z_i | x_j) of every sample under every posterior, ``[Q, N]`` nats.

    Args:
        z: ``[Q, latent]``.
        mean, logvar: of N posteriors, ``[N, latent]``.
    """
    z, mean, logvar = z.double(), mean.double(), logvar.double()
    precision = (-logvar).exp()
    constant = (mean.square() * precision + logvar).sum(1) + mean.shape[1] * math.log(2 * math.pi)
    quadratic = z.square() @ precision.T - 2 * z @ (mean * precision).T
    return -0.5 * (quadratic + constant)


def ranks(scores: Tensor, own: Tensor) -> Tensor:
    """How many candidates beat one's own, ``[Q]``; equal ones in shares spread evenly over queries.

    Args:
        scores: ``[Q, N]``, higher is better.
        own: ``[Q]`` int64, which candidate is one's own.
    """
    mine = scores.gather(1, own[:, None])
    better = (scores > mine).sum(1).double()
    ties = (scores == mine).sum(1).double() - 1
    spread = (torch.arange(len(scores), dtype=torch.float64) + 0.5) / len(scores)
    return better + (spread.to(ties.device) * (ties + 1)).floor()


def hit_rate(rank: Tensor, others: int, candidates: int) -> float:
    """How often one's own candidate wins against ``candidates - 1`` drawn from ``others``.

    Exact, not sampled: with rank r none of the r better ones may be drawn, C(A - r, n - 1) / C(A, n
    - 1) with A others.
    """
    drawn = candidates - 1
    if not 0 <= drawn <= others:
        raise ValueError(f"candidates must lie in 1..{others + 1}, got {candidates}")
    room = others - rank - drawn  # of those that do not beat one's own, how many are left over
    possible = room >= 0
    room = room.clamp(min=0)
    log_share = (
        torch.lgamma(others - rank + 1)
        - torch.lgamma(room + 1)
        - math.lgamma(others + 1)
        + math.lgamma(others - drawn + 1)
    )
    return float(torch.where(possible, log_share.exp().clamp(max=1), 0).mean())


@dataclass(frozen=True)
class MutualInformation:
    """Two bounds on I(x; z), nats."""

    lower: float
    upper: float
    cap: float  # ln N: the lower bound cannot be more, whatever I is


def mutual_information(log_density: Tensor, own: Tensor) -> MutualInformation:
    """Bounds from N posteriors and samples of some of them (arXiv:1905.06922).

    lower: E log [q(z|x) / mean of all N posteriors at z], InfoNCE with the known density; at most
    ln N. upper: the same with the mean over the N - 1 others; it is the leave-one-out bound.

    Args:
        log_density: `cross_log_density`, ``[Q, N]``.
        own: ``[Q]`` int64, whose sample each row is.
    """
    count = log_density.shape[1]
    mine = log_density.gather(1, own[:, None])[:, 0]
    lower = mine - (log_density.logsumexp(1) - math.log(count))
    others = log_density.scatter(1, own[:, None], -math.inf)
    upper = mine - (others.logsumexp(1) - math.log(count - 1))
    return MutualInformation(float(lower.mean()), float(upper.mean()), math.log(count))


def spread(code: Tensor) -> Tensor:
    """``[latent]``: the variance over pictures of their codes, posterior means ``[N, latent]``; a
    dimension is active where it is above `ACTIVE_VARIANCE`.
    """
    return code.double().var(0)


def bhattacharyya(q: DiagonalGaussian) -> Tensor:
    """Overlap of every two posteriors, ``[N, N]``: the integral of sqrt(q_i q_j), 1 if equal."""
    mean, logvar = q.mean.double(), q.logvar.double()
    distance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for m, lv in zip(mean.T, logvar.T):  # by dimension: memory stays N x N
        v = lv.exp()
        average = (v[:, None] + v) / 2
        distance += (m[:, None] - m).square() / (8 * average)
        distance += 0.5 * average.log() - 0.25 * (lv[:, None] + lv)
    return (-distance).exp()


@dataclass(frozen=True)
class Overlap:
    """Mean overlap of two different posteriors."""

    within: float  # of one class; nan without labels
    between: float  # of two classes; without labels, of any two pictures


def overlap(q: DiagonalGaussian, labels: Tensor | None) -> Overlap:
    """`bhattacharyya`, averaged within and between classes."""
    return _average(bhattacharyya(q), labels)


def sampled_overlap(log_density: Tensor, labels: Tensor | None) -> Overlap:
    """The same of any posteriors, estimated from one sample of each: the overlap of i and j is the
    mean of sqrt(q_j / q_i) over samples of i.

    Args:
        log_density: log q(z_i|x_j), ``[N, N]`` nats.
    """
    return _average((0.5 * (log_density - log_density.diagonal()[:, None])).exp(), labels)


def _average(matrix: Tensor, labels: Tensor | None) -> Overlap:
    different = ~torch.eye(len(matrix), dtype=torch.bool)
    if labels is None:
        return Overlap(math.nan, float(matrix[different].mean()))
    same = labels[:, None] == labels
    return Overlap(float(matrix[same & different].mean()), float(matrix[~same].mean()))
