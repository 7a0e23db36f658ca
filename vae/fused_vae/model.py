"""The variational autoencoder of Kingma & Welling (arXiv:1312.6114), on the fused operations.

    prior       p(z)   = N(0, I)
    posterior   q(z|x) = N(mean(x), diag exp(logvar(x)))       the encoder
    likelihood  p(x|z) = N(decode(z), variance)                the decoder
    ELBO(x)            = E_q[log p(x|z)] - KL(q(z|x) || p(z))  <= log p(x)

All of them are in nats per image, never averaged over pixels or latent dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    gaussian_log_likelihood,
    reparameterize,
    tracing,
)

from .likelihoods import GaussianLikelihood, Variance

__all__ = ["VAE", "GaussianLikelihood", "VAEOutput", "Variance"]


class VAEOutput(NamedTuple):
    """What one pass through the model gives."""

    loss: Tensor  # []: minus the ELBO (KL weighted by beta), batch mean; has the gradient
    log_likelihood: Tensor  # [B]: log p(x|z), z ~ q(z|x)
    kl: Tensor  # [B]: KL(q(z|x) || p(z)), unweighted
    reconstruction: Tensor  # [B, *event]: the mean of p(x|z)

    @property
    def elbo(self) -> Tensor:
        """[B]: log_likelihood - kl, whatever the beta that was trained with."""
        return self.log_likelihood - self.kl


class VAE(nn.Module):
    """A variational autoencoder with prior N(0, I) and Gaussian posterior and likelihood.

    Args:
        encoder: maps x ``[B, *event]`` to the moments of q(z|x), mean and log-variance concatenated
            along dimension 1.
        decoder: maps z ``[B, latent]`` to ``likelihood.outputs`` numbers per element of x,
            concatenated along dimension 1.
        likelihood: p(x|z) given what the decoder gives.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, likelihood: GaussianLikelihood
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x), a distribution over ``[B, latent]``."""
        with tracing.range("encoder"):
            return DiagonalGaussian.from_moments(self.encoder(x))

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor | float | None]:
        """Mean of p(x|z), of the shape of x, and log-variance, which broadcasts to it."""
        with tracing.range("decoder"):
            mean, logvar = self.likelihood(self.decoder(z))
        return mean, logvar

    def sample_kl(
        self, x: Tensor, *, key: NoiseKey | None = None, reduction: str = "sample"
    ) -> tuple[Tensor, Tensor]:
        """z ~ q(z|x) ``[B, latent]`` and KL(q(z|x) || p(z)) in nats, ``[B]`` or that of each
        dimension like z (``reduction="none"``); both with gradients.
        """
        q = self.encode(x)
        with tracing.range("latent"):
            return q.sample_kl(key=key, reduction=reduction)

    def forward(
        self, x: Tensor, *, key: NoiseKey | None = None, beta: float | Tensor = 1.0
    ) -> VAEOutput:
        """The negative ELBO and its parts, from one sample of z per image.

        Args:
            x: ``[B, *event]``.
            key: names the noise: the same key, the same z. None draws one from torch's generator.
            beta: weight of the KL in the loss (beta-VAE; 1 is the ELBO).
        """
        z, kl = self.sample_kl(x, key=key)
        mean, logvar = self.decode(z)
        with tracing.range("likelihood"):
            loss, log_likelihood, kl = elbo_loss(mean, x, kl=kl, recon_logvar=logvar, beta=beta)
        return VAEOutput(loss, log_likelihood, kl, mean)

    @torch.no_grad()
    def code(self, x: Tensor) -> Tensor:
        """The mean of q(z|x), ``[B, latent]``."""
        return self.encode(x).mode()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at `code`: the picture without sampling noise."""
        return self.decode(self.code(x))[0]

    @torch.no_grad()
    def sample(self, *shape: int, key: NoiseKey | None = None) -> Tensor:
        """The mean of p(x|z) for z ~ N(0, I); ``vae.sample(64, 16)`` is 64 pictures."""
        like = next(self.parameters())
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.decode(reparameterize(zeros, zeros, key=key))[0]

    @torch.no_grad()
    def log_prob(
        self, x: Tensor, num_samples: int = 100, *, key: NoiseKey | None = None, chunk: int = 10
    ) -> Tensor:
        """Importance-weighted lower bound on log p(x), ``[B]`` nats (IWAE, arXiv:1509.00519).

        log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) with z_k ~ q(z|x): the ELBO for K = 1, tighter with
        every further sample. Decodes ``chunk`` samples per image at a time, each with a folded key.
        """
        if num_samples < 1 or chunk < 1:
            raise ValueError(f"num_samples and chunk must be positive, got {num_samples}, {chunk}")
        q = self.encode(x)
        log_weights = []
        for start in range(0, num_samples, chunk):
            z = q.rsample(min(chunk, num_samples - start), key=key and key.fold_in(start))
            log_weights.append(self.log_weights(x, z, q))
        return torch.cat(log_weights).logsumexp(0) - math.log(num_samples)

    def log_weights(self, x: Tensor, z: Tensor, q: DiagonalGaussian) -> Tensor:
        """log p(x, z_k) - log q(z_k|x) of samples ``[K, B, *latent]``, ``[K, B]`` nats."""
        log_prior = gaussian_log_likelihood(z, torch.zeros_like(q.mean))
        return self.log_likelihood(x, z) + log_prior - q.log_prob(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z_k) of samples ``[K, B, *latent]``, ``[K, B]`` nats."""
        mean, logvar = self.decode(z.flatten(0, 1))
        mean = mean.unflatten(0, z.shape[:2])
        if isinstance(logvar, Tensor) and logvar.dim() > 0:
            logvar = logvar.unflatten(0, z.shape[:2])
        return gaussian_log_likelihood(x, mean, logvar)
