"""A VAE with several stochastic layers: the ladder of arXiv:1602.02282, whose posterior and prior
share the way down.

    prior       p(z) = p(z_1) prod_l p(z_l | z_<l)         z_1 is the top, N(0, I)
    posterior   q(z|x) = prod_l q(z_l | z_<l, x)           the way up sees x, the way down sees z_<l
    rate        sum_l KL(q(z_l | z_<l, x) || p(z_l | z_<l))
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey, elbo_loss, reparameterize, reparameterize_kl, tracing

from .likelihoods import GaussianLikelihood
from .networks import ImageShape


class HierarchicalOutput(NamedTuple):
    """What one pass gives; ``layer_kl`` is for objectives that price layers apart."""

    loss: Tensor  # []
    log_likelihood: Tensor  # [B], detached
    kl: Tensor  # [B], detached, the sum over layers
    reconstruction: Tensor  # [B, *event]
    layer_kl: Tensor  # [layers, B], top first, with gradient

    @property
    def elbo(self) -> Tensor:
        """[B]: log_likelihood - kl."""
        return self.log_likelihood - self.kl


class HierarchicalVAE(nn.Module):
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

    def forward(
        self, x: Tensor, *, key: NoiseKey | None = None, beta: float | Tensor = 1.0
    ) -> HierarchicalOutput:
        """The negative ELBO and its parts; layer l draws the noise of ``key.fold_in(l)``."""
        with tracing.range("encoder"):
            states = []
            state = x.flatten(1)
            for block in self.up:
                state = block(state)
                states.append(state)
        way_down, rates = self.top.expand(len(x), -1), []
        for layer, seen in enumerate(reversed(states)):
            with tracing.range("latent"):
                mean, logvar = self.posterior[layer](torch.cat([way_down, seen], 1)).chunk(2, 1)
                prior = (None, None) if layer == 0 else self.prior_moments(layer, way_down)
                z, kl = reparameterize_kl(mean, logvar, *prior, key=key and key.fold_in(layer))
            rates.append(kl)
            with tracing.range("decoder"):
                way_down = self.down[layer](torch.cat([way_down, z], 1))
        with tracing.range("decoder"):
            recon, recon_logvar = self.likelihood(self.decoder(way_down))
        layer_kl = torch.stack(rates)
        with tracing.range("likelihood"):
            rate = layer_kl.sum(0)
            loss, ll, kl = elbo_loss(recon, x, kl=rate, recon_logvar=recon_logvar, beta=beta)
        return HierarchicalOutput(loss, ll, kl, recon, layer_kl)

    def prior_moments(self, layer: int, way_down: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(z_l | z_<l) for a layer below the top."""
        mean, logvar = self.prior[layer - 1](way_down).chunk(2, 1)
        return mean, logvar

    @torch.no_grad()
    def sample(self, count: int, *, key: NoiseKey | None = None) -> Tensor:
        """``[count, *event]``: the mean of p(x|z) for z from the prior, layer by layer."""
        way_down = self.top.expand(count, -1)
        for layer, size in enumerate(self.latents):
            mean = logvar = way_down.new_zeros(count, size)
            if layer > 0:
                mean, logvar = self.prior_moments(layer, way_down)
            z = reparameterize(mean, logvar, key=key and key.fold_in(layer))
            way_down = self.down[layer](torch.cat([way_down, z], 1))
        decoded: Tensor = self.likelihood(self.decoder(way_down))[0]
        return decoded
