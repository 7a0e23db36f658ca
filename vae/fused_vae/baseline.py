"""Probabilistic PCA: the best a linear VAE could do, in closed form.

x = W z + mean + noise, z ~ N(0, I), noise ~ N(0, sigma^2 I) (Tipping & Bishop, J. R. Stat. Soc. B
61, 1999). It has the same latent size and the same likelihood, one learned sigma, as the default
VAE, and its log p(x) is exact, not a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 4096
"""Pixels above which the covariance is not formed."""


@dataclass(frozen=True)
class ProbabilisticPCA:
    """A fitted model, float64. The covariance of x is sigma^2 I + W W^T; `variances` are its
    `latent` top eigenvalues.
    """

    mean: Tensor  # [D]
    directions: Tensor  # [D, latent], orthonormal
    variances: Tensor  # [latent]
    noise_variance: float

    @classmethod
    def fit(cls, x: Tensor, latent: int, *, floor: float = 0.0) -> ProbabilisticPCA:
        """Maximum likelihood from ``[N, *event]``.

        W spans the top eigenvectors of the covariance; sigma^2 is the mean of all the other
        eigenvalues, at least ``floor**2``. Large images are fitted on the first `LARGE` of them.
        """
        flat = x.flatten(1).double()
        if flat.shape[1] > LARGE:
            flat = flat[:LARGE]
        count, size = flat.shape
        mean = flat.mean(0)
        centered = flat - mean
        latent = min(latent, size - 1, count - 1)
        if size <= count:
            eigenvalues, vectors = torch.linalg.eigh(centered.T @ centered / count)
            top, directions = eigenvalues[-latent:], vectors[:, -latent:]
        else:  # the Gram matrix has the same nonzero eigenvalues and is smaller
            eigenvalues, vectors = torch.linalg.eigh(centered @ centered.T / count)
            top = eigenvalues[-latent:]
            directions = centered.T @ vectors[:, -latent:] / (count * top).sqrt()
        rest = float(centered.square().sum()) / count - float(top.sum())
        noise_variance = max(rest / (size - latent), floor**2)
        return cls(mean, directions, top.clamp(min=noise_variance), noise_variance)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log p(x), ``[B]`` nats."""
        centered = x.flatten(1).double() - self.mean
        scores = centered @ self.directions
        remainder = centered.square().sum(1) - scores.square().sum(1)
        mahalanobis = (scores.square() / self.variances).sum(1) + remainder / self.noise_variance
        rest = len(self.mean) - len(self.variances)
        logdet = float(self.variances.log().sum()) + rest * math.log(self.noise_variance)
        return -0.5 * (mahalanobis + logdet + len(self.mean) * math.log(2 * math.pi))
