"""RealNVP as a prior (arXiv:1605.08803): a stack of couplings that is as quick to invert as to
compute.

    eps = f(z),    log p(z) = log N(eps; 0, I) + log |det df/dz|,    samples: f^-1(eps)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey, reparameterize

from .checks import latent_vectors, positive, wide
from .priors import Prior, log_normal


class AffineCoupling(nn.Module):
    """eps_b = z_b exp(s(z_a)) + t(z_a) and eps_a = z_a (equations 7 and 8), log |det| = sum s.

    s and t come from one network, s through a tanh with a learned scale; their last layer starts at
    zero, so that the coupling starts as the identity.

    Args:
        latent: dimensions of z.
        hidden: units of the network's two hidden layers.
        parity: 0 keeps the even dimensions (a) and changes the odd ones (b), 1 the other way round.
    """

    kept: Tensor

    def __init__(self, latent: int, hidden: int, parity: int) -> None:
        super().__init__()
        kept = (torch.arange(latent) % 2 == parity).to(torch.get_default_dtype())
        self.register_buffer("kept", kept, persistent=False)
        last = nn.Linear(hidden, 2 * latent)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )
        self.scale = nn.Parameter(torch.ones(latent))

    def _log_scale_and_shift(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s, t = wide(self.network(z * self.kept)).chunk(2, -1)
        changed = 1 - self.kept
        return changed * self.scale * s.tanh(), changed * t

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """eps ``[..., latent]`` and log |det|, ``[...]`` nats."""
        log_scale, shift = self._log_scale_and_shift(z)
        return z * log_scale.exp() + shift, log_scale.sum(-1)

    def inverse(self, eps: Tensor) -> Tensor:
        """The z that `forward` maps to `eps`."""
        log_scale, shift = self._log_scale_and_shift(eps)  # they see eps_a = z_a only
        return (eps - shift) * (-log_scale).exp()


class RealNVP(Prior):
    """The density that couplings make of N(0, I), which is where training starts.

    Args:
        latent: dimensions of z. With one dimension there is nothing to see, and the prior is a
            Gaussian.
        couplings: how many; the dimensions they change alternate.
        hidden: units of their networks' hidden layers.

    Raises:
        ValueError: a size that is not positive, a z that is not ``[..., latent]``.
    """

    def __init__(self, latent: int, couplings: int = 6, hidden: int = 64) -> None:
        super().__init__()
        positive("RealNVP", latent=latent, couplings=couplings, hidden=hidden)
        self.latent = latent
        self.couplings = nn.ModuleList(
            AffineCoupling(latent, hidden, parity=index % 2) for index in range(couplings)
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """f(z) and log |det df/dz|, ``[...]`` nats."""
        latent_vectors("RealNVP", z, self.latent)
        eps = wide(z)
        log_det = torch.zeros_like(eps[..., 0])
        for coupling in self.couplings:
            eps, term = coupling(eps)
            log_det = log_det + term
        return eps, log_det

    def inverse(self, eps: Tensor) -> Tensor:
        """The z with f(z) = eps."""
        latent_vectors("RealNVP", eps, self.latent)
        z = eps
        for coupling in reversed(list(self.couplings)):
            assert isinstance(coupling, AffineCoupling)
            z = coupling.inverse(z)
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        """See `Prior`."""
        eps, log_det = self.forward(z)
        return log_normal(eps) + log_det

    @torch.no_grad()
    def sample(self, count: int, *, key: NoiseKey | None = None) -> Tensor:
        """See `Prior`."""
        positive("RealNVP", count=count)
        zeros = next(self.parameters()).new_zeros(count, self.latent)
        return self.inverse(reparameterize(zeros, zeros, key=key))
