"""The network of a hierarchical VAE: the way up sees x, the way down the latents above, and each
layer has its moments from both (ladder VAE, arXiv:1602.02282).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from fused_elbo import tracing

from .likelihoods import GaussianLikelihood
from .networks import ImageShape

Draw = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""From a layer's number and the state above it: z, and a number per image or dimension."""

Decoded = tuple[Tensor, Tensor | float | None]
"""Mean and log-variance of p(x|z)."""


class Ladder(nn.Module):
    """Fully connected, with one latent vector per layer.

    Args:
        image: channels, height, width.
        latents: dimensions of each layer, top first, e.g. ``(4, 16)``.
        width: of the deterministic state on the way up and down.
        likelihood: p(x|z).
    """

    def __init__(
        self,
        image: ImageShape,
        latents: Sequence[int],
        likelihood: GaussianLikelihood,
        width: int = 256,
    ) -> None:
        super().__init__()
        if not latents or min(latents) < 1:
            raise ValueError(f"latents must be one positive size per layer, got {tuple(latents)}")
        self.latents = tuple(latents)
        self.likelihood = likelihood
        self.up = nn.ModuleList()  # the last one feeds the top
        size = prod(image)
        for _ in latents:
            self.up.append(nn.Sequential(nn.Linear(size, width), nn.SiLU()))
            size = width
        self.posterior = nn.ModuleList(nn.Linear(2 * width, 2 * z) for z in latents)
        self.prior = nn.ModuleList(nn.Linear(width, 2 * z) for z in latents[1:])
        self.down = nn.ModuleList(
            nn.Sequential(nn.Linear(width + z, width), nn.SiLU()) for z in latents
        )
        self.top = nn.Parameter(torch.zeros(width))
        self.decoder = nn.Sequential(
            nn.Linear(width, likelihood.outputs * prod(image)),
            nn.Unflatten(1, (likelihood.outputs * image[0], *image[1:])),
        )

    def way_up(self, x: Tensor) -> list[Tensor]:
        """What the posterior of each layer sees of x, ``[B, width]``, top first."""
        states = [x.flatten(1)]
        with tracing.range("encoder"):
            for block in self.up:
                states.append(block(states[-1]))
        return states[:0:-1]

    def posterior_moments(
        self, layer: int, way_down: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z_l | z_<l, x)."""
        mean, logvar = self.posterior[layer](torch.cat([way_down, seen], 1)).chunk(2, 1)
        return mean, logvar

    def prior_moments(
        self, layer: int, way_down: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of p(z_l | z_<l); None at the top, where it is N(0, I)."""
        if layer == 0:
            return None, None
        mean, logvar = self.prior[layer - 1](way_down).chunk(2, 1)
        return mean, logvar

    def descend(self, count: int, draw: Draw) -> tuple[Decoded, list[Tensor], list[Tensor]]:
        """p(x|z), and what `draw` gave for each layer."""
        way_down, drawn, numbers = self.top.expand(count, -1), [], []
        for layer, block in enumerate(self.down):
            with tracing.range("latent"):
                z, number = draw(layer, way_down)
            drawn.append(z)
            numbers.append(number)
            with tracing.range("decoder"):
                way_down = block(torch.cat([way_down, z], 1))
        with tracing.range("decoder"):
            mean, logvar = self.likelihood(self.decoder(way_down))
        return (mean, logvar), drawn, numbers
