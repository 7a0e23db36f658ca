"""A VAE with several stochastic layers: the ladder of arXiv:1602.02282, whose posterior and prior
share the way down.

    prior       p(z) = p(z_1) prod_l p(z_l | z_<l)         z_1 is the top, N(0, I)
    posterior   q(z|x) = prod_l q(z_l | z_<l, x)           the way up sees x, the way down sees z_<l
    rate        sum_l KL(q(z_l | z_<l, x) || p(z_l | z_<l))
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_elbo import (
    NoiseKey,
    elbo_loss,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
    tracing,
)

from .ladder import Decoded, Draw, Ladder


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


class HierarchicalVAE(Ladder):
    """A ladder as a model: layer l draws the noise of ``key.fold_in(l)``.

    z stands for the vectors of all layers side by side, top first, ``[B, sum(latents)]``. Arguments
    as of `Ladder`.
    """

    def forward(
        self, x: Tensor, *, key: NoiseKey | None = None, beta: float | Tensor = 1.0
    ) -> HierarchicalOutput:
        """The negative ELBO and its parts."""
        (recon, recon_logvar), _, rates = self.descend(len(x), self._posterior(x, key))
        layer_kl = torch.stack(rates)
        with tracing.range("likelihood"):
            rate = layer_kl.sum(0)
            loss, ll, kl = elbo_loss(recon, x, kl=rate, recon_logvar=recon_logvar, beta=beta)
        return HierarchicalOutput(loss, ll, kl, recon, layer_kl)

    def sample_kl(
        self, x: Tensor, *, key: NoiseKey | None = None, reduction: str = "sample"
    ) -> tuple[Tensor, Tensor]:
        """z ~ q(z|x), and the rate in nats: ``[B]``, or that of each dimension like z
        (``reduction="none"``); both with gradients.
        """
        _, z, kl = self.descend(len(x), self._posterior(x, key, reduction))
        return torch.cat(z, 1), torch.cat(kl, 1) if reduction == "none" else torch.stack(kl).sum(0)

    def decode(self, z: Tensor) -> Decoded:
        """Mean and log-variance of p(x|z)."""
        parts = z.split(self.latents, 1)
        return self.descend(len(z), lambda layer, _: (parts[layer], parts[layer]))[0]

    def states(self, z: Tensor) -> list[Tensor]:
        """The state above each layer, ``[B, width]``, top first."""
        parts = z.split(self.latents, 1)
        return self.descend(len(z), lambda layer, way_down: (parts[layer], way_down))[2]

    def _posterior(self, x: Tensor, key: NoiseKey | None, reduction: str = "sample") -> Draw:
        seen = self.way_up(x)

        def draw(layer: int, way_down: Tensor) -> tuple[Tensor, Tensor]:
            q = self.posterior_moments(layer, way_down, seen[layer])
            p = self.prior_moments(layer, way_down)
            return reparameterize_kl(*q, *p, key=key and key.fold_in(layer), reduction=reduction)

        return draw

    @torch.no_grad()
    def code(self, x: Tensor) -> Tensor:
        """The means of q(z_l | z_<l, x), each given those above it, like z."""
        seen = self.way_up(x)

        def draw(layer: int, way_down: Tensor) -> tuple[Tensor, Tensor]:
            mean, _ = self.posterior_moments(layer, way_down, seen[layer])
            return mean, mean

        return torch.cat(self.descend(len(x), draw)[1], 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at `code`."""
        return self.decode(self.code(x))[0]

    @torch.no_grad()
    def sample(self, count: int, *, key: NoiseKey | None = None) -> Tensor:
        """``[count, *event]``: the mean of p(x|z) for z from the prior, layer by layer."""

        def draw(layer: int, way_down: Tensor) -> tuple[Tensor, Tensor]:
            mean, logvar = self.prior_moments(layer, way_down)
            if mean is None or logvar is None:
                mean = logvar = way_down.new_zeros(count, self.latents[0])
            z = reparameterize(mean, logvar, key=key and key.fold_in(layer))
            return z, z

        return self.descend(count, draw)[0][0]

    @torch.no_grad()
    def log_prob(self, x: Tensor, num_samples: int = 100, *, key: NoiseKey | None = None) -> Tensor:
        """Importance-weighted lower bound on log p(x), ``[B]`` nats, as `VAE.log_prob`."""
        if num_samples < 1:
            raise ValueError(f"log_prob: num_samples must be positive, got {num_samples}")
        log_weights = []
        for index in range(num_samples):
            z, _ = self.sample_kl(x, key=key and key.fold_in(index))
            log_weights.append(self.log_weight(x, z))
        return torch.stack(log_weights).logsumexp(0) - math.log(num_samples)

    def log_weight(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) - log q(z|x) ``[B]`` nats."""
        seen, parts = self.way_up(x), z.split(self.latents, 1)

        def draw(layer: int, way_down: Tensor) -> tuple[Tensor, Tensor]:
            part = parts[layer]
            log_q = gaussian_log_likelihood(
                part, *self.posterior_moments(layer, way_down, seen[layer])
            )
            mean, logvar = self.prior_moments(layer, way_down)
            mean = torch.zeros_like(part) if mean is None else mean
            return part, gaussian_log_likelihood(part, mean, logvar) - log_q

        (mean, logvar), _, log_ratios = self.descend(len(x), draw)
        return gaussian_log_likelihood(x, mean, logvar) + torch.stack(log_ratios).sum(0)
