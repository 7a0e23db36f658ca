"""Priors p(z) in the place of N(0, I): mixtures of Gaussians (`RealNVP` has its own file)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_elbo import DiagonalGaussian, NoiseKey, gaussian_log_likelihood, reparameterize

from .checks import latent_vectors, positive


class Prior(nn.Module):
    """A density of latent vectors that can be evaluated and sampled."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), ``[..., latent] -> [...]`` nats, with gradient."""
        raise NotImplementedError

    def sample(self, count: int, *, key: NoiseKey | None = None) -> Tensor:
        """``[count, latent]``; the same key gives the same samples, None draws from torch's
        generator.
        """
        raise NotImplementedError


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I), ``[..., latent] -> [...]`` nats."""
    rows = z.reshape(-1, z.shape[-1])
    return gaussian_log_likelihood(rows, torch.zeros_like(rows)).reshape(z.shape[:-1])


class _Mixture(Prior):
    """sum_k weight_k N(mean_k, diag exp(logvar_k)); a subclass says what the components are."""

    def components(self) -> tuple[DiagonalGaussian, Tensor]:
        """K Gaussians, ``[K, latent]``, and their log-weights ``[K]``."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """See `Prior`."""
        q, log_weights = self.components()
        count, latent = q.mean.shape
        latent_vectors(type(self).__name__, z, latent)
        each = q.log_prob(z.reshape(-1, 1, latent).expand(-1, count, -1))  # [N, K]
        return (each + log_weights).logsumexp(1).reshape(z.shape[:-1])

    @torch.no_grad()
    def sample(self, count: int, *, key: NoiseKey | None = None) -> Tensor:
        """See `Prior`. A component is chosen where the cumulative weights pass Phi of one normal
        number, so that the key decides it on every device.
        """
        positive(type(self).__name__, count=count)
        q, log_weights = self.components()
        zeros = q.mean.new_zeros(count, 1)
        uniform = torch.special.ndtr(reparameterize(zeros, zeros, key=key and key.fold_in(0)))
        last = len(log_weights) - 1  # rounding may leave the sum of all weights below `uniform`
        chosen = torch.searchsorted(log_weights.exp().cumsum(0), uniform[:, 0]).clamp(max=last)
        return reparameterize(q.mean[chosen], q.logvar[chosen], key=key and key.fold_in(1))


class GaussianMixture(_Mixture):
    """A mixture of learned Gaussians with learned weights.

    Args:
        latent: dimensions of z.
        components: how many Gaussians; their means start as samples of N(0, I).

    Raises:
        ValueError: a size that is not positive, a z that is not ``[..., latent]``.
    """

    def __init__(self, latent: int, components: int = 10) -> None:
        super().__init__()
        positive("GaussianMixture", latent=latent, components=components)
        self.mean = nn.Parameter(torch.randn(components, latent))
        self.logvar = nn.Parameter(torch.zeros(components, latent))
        self.logits = nn.Parameter(torch.zeros(components))

    def components(self) -> tuple[DiagonalGaussian, Tensor]:
        """See `_Mixture`."""
        return DiagonalGaussian(self.mean, self.logvar), self.logits.log_softmax(0)


class VampPrior(_Mixture):
    """p(z) = 1/K sum_k q(z|u_k): the posteriors of K learned pseudo-inputs (arXiv:1705.07120).

    With the data themselves as pseudo-inputs it would be the aggregate posterior, the prior of the
    least rate. With a flow in the model, q(z|u_k) is the Gaussian before the flow.

    Args:
        encoder: the encoder of the VAE. It is held, not owned: its parameters are the model's, and
            are neither saved nor moved with the prior.
        pseudo_inputs: ``[K, *event]``, what they start from, e.g. K training pictures; trained.

    Raises:
        ValueError: no pseudo-input, a z of another size than the encoder's.
    """

    def __init__(self, encoder: nn.Module, pseudo_inputs: Tensor) -> None:
        super().__init__()
        if pseudo_inputs.dim() < 2 or len(pseudo_inputs) == 0:
            raise ValueError(
                "VampPrior: pseudo_inputs must have shape [K, *event] with K > 0, got "
                f"{tuple(pseudo_inputs.shape)}"
            )
        self._encoder = (encoder,)  # in a tuple, so that it is no submodule
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())

    def components(self) -> tuple[DiagonalGaussian, Tensor]:
        """See `_Mixture`."""
        q = DiagonalGaussian.from_moments(self._encoder[0](self.pseudo_inputs))
        return q, q.mean.new_full((len(q.mean),), -math.log(len(q.mean)))
