"""Normalizing flows on a sample of the Gaussian posterior (arXiv:1505.05770); `iaf` has the
autoregressive one.

    z = f(z_0),    log q(z|x) = log q_0(z_0|x) - log |det df/dz_0|

Training needs the way forward alone: the samples whose density is asked for are its own. The way
back gives the density of one picture's posterior at another's sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import latent_vectors, positive, wide

HALVINGS = 60
"""Of an interval, until float64 tells its ends apart no more."""


class Flow(nn.Module):
    """An invertible map of latent vectors that may depend on x.

    ``flow(z_0, x)``, with z_0 ``[..., B, latent]`` and x ``[B, *event]``, gives z of the same shape
    and log |det df/dz_0|, ``[..., B]`` nats. float32 at least; float64 stays float64.
    """

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        raise NotImplementedError

    def inverse(self, z: Tensor, x: Tensor) -> Tensor:
        """The z_0 that ``forward(z_0, x)`` maps to `z`; without gradient. Meant for float64."""
        raise NotImplementedError


class PlanarFlow(Flow):
    """f(z) = z + u tanh(w.z + b), some layers deep (arXiv:1505.05770, section 4.1).

        log |det| = log |1 + u.psi(z)|,    psi(z) = (1 - tanh(w.z + b)^2) w

    A layer is invertible where w.u >= -1 (appendix A.1); u is moved along w to
    w.u' = softplus(w.u + ln(e - 1)) - 1. The paper has no ln(e - 1); with it u = 0 is the identity,
    which is where training starts. The determinant is then softplus(..) (1 - h^2) + h^2 with
    h = tanh(w.z + b), whose terms are positive: nothing cancels as w.u' nears -1.

    Args:
        latent: dimensions of z.
        layers: how many.
        context: maps x to ``[B, layers * (2 * latent + 1)]``, added to the (u, w, b) of each layer
            (the amortized flow of the paper). None: the same flow for every x.

    Raises:
        ValueError: a size that is not positive, a z that is not ``[..., latent]``.
    """

    def __init__(self, latent: int, layers: int = 4, context: nn.Module | None = None) -> None:
        super().__init__()
        positive("PlanarFlow", latent=latent, layers=layers)
        self.latent = latent
        self.context = context
        scale = torch.cat([torch.zeros(latent), torch.ones(latent), torch.zeros(1)])
        self.layers = nn.Parameter(torch.randn(layers, 2 * latent + 1) * scale / latent**0.5)

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Flow`."""
        latent_vectors("PlanarFlow", z, self.latent)
        z = wide(z)
        log_det = torch.zeros_like(z[..., 0])
        for u, w, b, slope in self._layers(x):
            h = ((w * z).sum(-1, keepdim=True) + b).tanh()
            z = z + u * h
            log_det = log_det + (slope * (1 - h.square()) + h.square()).log()[..., 0]
        return z, log_det

    def _layers(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """u', w, b and 1 + w.u' of each layer, ``[latent or 1]``, with a context ``[B, ...]``."""
        layers = self.layers
        if self.context is not None:
            layers = layers + wide(self.context(x)).unflatten(1, layers.shape)
        found = []
        for u, w, b in (p.split([self.latent, self.latent, 1], -1) for p in layers.unbind(-2)):
            inner = (w * u).sum(-1, keepdim=True)
            slope = F.softplus(inner + math.log(math.e - 1))
            norm = w.square().sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
            found.append((u + (slope - 1 - inner) * w / norm, w, b, slope))
        return found

    @torch.no_grad()
    def inverse(self, z: Tensor, x: Tensor) -> Tensor:
        """See `Flow`. Along w a layer is the increasing function a + w.u' tanh(a + b) of a = w.z,
        inverted by halving an interval that holds the root.
        """
        latent_vectors("PlanarFlow", z, self.latent)
        z = wide(z)
        for u, w, b, slope in reversed(self._layers(x)):
            target, push = (w * z).sum(-1, keepdim=True), slope - 1
            low, high = target - push.abs(), target + push.abs()
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                below = middle + push * (middle + b).tanh() < target
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            z = z - u * ((low + high) / 2 + b).tanh()
        return z
