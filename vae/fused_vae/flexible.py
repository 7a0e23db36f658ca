"""A VAE whose posterior or prior is more than a Gaussian (arXiv:1505.05770, arXiv:1705.07120).

    z_0 ~ q_0(z_0|x) = N(mean(x), diag exp(logvar(x))),    z = f(z_0)
    ELBO = E_q0[log p(x|z) + log p(z) + log |det df/dz_0| - log q_0(z_0|x)]

The base sample and the closed-form part of the rate come from the fused operation; a flow f and a
prior p(z) add what no closed form has, estimated from the same sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_elbo import DiagonalGaussian, NoiseKey, tracing

from .flows import Flow
from .likelihoods import GaussianLikelihood
from .model import VAE
from .priors import Prior, log_normal


class FlexibleVAE(VAE):
    """`VAE` with a flow behind its encoder, a prior of its own, or both.

    ``encode`` gives q_0, the base. ``kl`` is one sample's estimate of KL(q(z|x) || p(z)), right on
    average and possibly negative for one picture.

    Args:
        encoder, decoder, likelihood: as for `VAE`; z is a vector.
        flow: f, which may depend on x. None: the identity.
        prior: p(z). None: N(0, I).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: GaussianLikelihood,
        *,
        flow: Flow | None = None,
        prior: Prior | None = None,
    ) -> None:
        super().__init__(encoder, decoder, likelihood)
        self.flow = flow
        self.prior = prior

    def transform(self, z_0: Tensor, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """z = f(z_0) and log |det df/dz_0|, ``[..., B]`` nats, of base samples
        ``[..., B, latent]``.
        """
        return (z_0, 0.0) if self.flow is None else self.flow(z_0, x)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z), ``[..., latent] -> [...]`` nats."""
        return log_normal(z) if self.prior is None else self.prior.log_prob(z)

    def sample_kl(
        self, x: Tensor, *, key: NoiseKey | None = None, reduction: str = "sample"
    ) -> tuple[Tensor, Tensor]:
        """z = f(z_0) ``[B, latent]`` and its estimate of KL(q(z|x) || p(z)), ``[B]`` nats.

            KL = KL(q_0 || N(0, I)) + E_q0[log N(z_0; 0, I) - log |det df/dz_0| - log p(z)]

        which is E[log q(z|x) - log p(z)] with E[log q_0 - log N(z_0; 0, I)] in closed form. What is
        left to estimate is zero, for every sample, where f is the identity and p is N(0, I).

        Raises:
            ValueError: a `reduction` other than "sample"; the estimate has no share per dimension.
        """
        if reduction != "sample":
            raise ValueError(f"sample_kl: reduction must be 'sample', got {reduction!r}")
        q_0 = self.encode(x)
        with tracing.range("latent"):
            z_0, kl = q_0.sample_kl(key=key)
            z, log_det = self.transform(z_0, x)
            return z, kl + (log_normal(z_0) - log_det - self.log_prior(z))

    def log_weights(self, x: Tensor, z: Tensor, q: DiagonalGaussian) -> Tensor:
        """log p(x, f(z_0)) + log |det df/dz_0| - log q_0(z_0|x) of base samples `z`
        ``[K, B, latent]``, ``[K, B]`` nats.
        """
        log_q = q.log_prob(z)
        z, log_det = self.transform(z, x)
        return self.log_likelihood(x, z) + self.log_prior(z) + log_det - log_q

    @torch.no_grad()
    def code(self, x: Tensor) -> Tensor:
        """f(mean of q_0), ``[B, latent]``."""
        return self.transform(self.encode(x).mode(), x)[0]

    @torch.no_grad()
    def sample(self, *shape: int, key: NoiseKey | None = None) -> Tensor:
        """The mean of p(x|z) for z ~ p(z) of this shape: ``vae.sample(64, 16)`` is 64 pictures."""
        if self.prior is None:
            return super().sample(*shape, key=key)
        z = self.prior.sample(shape[0], key=key)
        if z.shape != shape:
            raise ValueError(f"sample: shape must be {tuple(z.shape)} with this prior, got {shape}")
        return self.decode(z)[0]
