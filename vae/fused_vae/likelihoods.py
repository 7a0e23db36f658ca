"""The Gaussian p(x|z) and the four ways to choose its variance."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Variance = Literal["unit", "fixed", "learned", "predicted"]


class GaussianLikelihood(nn.Module):
    """p(x|z) = N(mean, variance), with one of four ways to choose the variance.

    ``unit``
        Variance 1: minus the log-likelihood is half the summed squared error plus a constant.
    ``fixed``
        ``sigma**2`` everywhere. Equals ``unit`` with beta = sigma**2 up to scale, so a fixed sigma
        is a choice of beta.
    ``learned``
        One sigma for the whole data set, trained with the rest; its optimum is the root-mean-square
        residual (sigma-VAE, arXiv:2006.13202).
    ``predicted``
        The decoder gives a log-variance beside each mean: it needs ``outputs`` = 2 numbers per
        pixel.

    Args:
        variance: which of the four.
        sigma: the standard deviation that ``fixed`` keeps and ``learned`` starts from.
        bounded: pixels lie in [0, 1], and so does the mean: what the decoder gives for it goes
            through a sigmoid.
        floor: the least sigma that ``predicted`` may give, e.g. the rounding error of the pixels.
            Without it the density of a constant pixel has no upper bound.

    Raises:
        ValueError: an unknown variance, a sigma that is not positive.
    """

    def __init__(
        self,
        variance: Variance = "learned",
        sigma: float = 0.25,
        *,
        bounded: bool = False,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        if variance not in get_args(Variance):
            raise ValueError(f"variance must be one of {get_args(Variance)}, got {variance!r}")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.variance = variance
        self.bounded = bounded
        self.floor = floor
        self.logvar: nn.Parameter | float | None = None
        if variance == "fixed":
            self.logvar = 2 * math.log(sigma)
        elif variance == "learned":
            self.logvar = nn.Parameter(torch.tensor(2 * math.log(sigma)))

    @property
    def outputs(self) -> int:
        """How many numbers per pixel the decoder must give."""
        return 2 if self.variance == "predicted" else 1

    def forward(self, decoded: Tensor) -> tuple[Tensor, Tensor | float | None]:
        """Split what the decoder gave into mean and log-variance (None: unit variance)."""
        mean = decoded
        logvar: Tensor | float | None = self.logvar
        if self.variance == "predicted":
            mean, spread = decoded.chunk(2, dim=1)
            logvar = spread.clamp(min=2 * math.log(self.floor)) if self.floor > 0 else spread
        return (mean.sigmoid() if self.bounded else mean), logvar
