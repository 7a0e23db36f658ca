"""The posteriors of any model as densities of its codes z: what a report compares pictures by.

z is one vector per picture, of all stochastic layers side by side.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fused_elbo import DiagonalGaussian, NoiseKey

from . import analysis
from .architecture import Model
from .flexible import FlexibleVAE
from .hierarchy import HierarchicalVAE

PAIRS = 2**16
"""How many pairs of a code and a picture go through a network together."""


def encode(model: Model, x: Tensor) -> DiagonalGaussian | None:
    """q(z|x) of many pictures where it is Gaussian: no flow, one layer."""
    if isinstance(model, HierarchicalVAE) or (
        isinstance(model, FlexibleVAE) and model.flow is not None
    ):
        return None
    parts = [model.encode(batch) for batch in x.split(250)]
    return DiagonalGaussian(
        torch.cat([q.mean for q in parts]), torch.cat([q.logvar for q in parts])
    )


def rate_per_dimension(model: Model, x: Tensor, key: NoiseKey) -> Tensor | None:
    """Mean over the pictures, ``[latent]`` nats; None where flow or prior tie dimensions
    together.
    """
    if isinstance(model, FlexibleVAE):
        return None
    kl = model.sample_kl(x, key=key, reduction="none")[1]
    return kl.double().mean(0)


def cross_log_density(model: Model, z: Tensor, x: Tensor) -> Tensor:
    """log q(z_i|x_j) of every code under the posterior of every picture, ``[Q, N]`` nats, float64.

    Args:
        z: ``[Q, latent]``.
        x: ``[N, *event]``.
    """
    q = encode(model, x)
    if q is not None:
        return analysis.cross_log_density(z, q.mean, q.logvar)
    exact = copy.deepcopy(model).double()
    rows = z.double().split(max(1, PAIRS // len(x)))
    if isinstance(exact, HierarchicalVAE):
        return torch.cat([_of_layers(exact, part, x.double()) for part in rows])
    assert isinstance(exact, FlexibleVAE)
    return torch.cat([_of_flow(exact, part, x.double()) for part in rows])


def _of_flow(model: FlexibleVAE, z: Tensor, x: Tensor) -> Tensor:
    """Each code back to the base of each posterior, and the change of volume."""
    assert model.flow is not None
    pairs = z[:, None].expand(-1, len(x), -1)
    z_0 = model.flow.inverse(pairs, x)
    log_det = model.transform(z_0, x)[1]
    density = model.encode(x).log_prob(z_0) - log_det
    # A code that no base sample reaches in floating point has no density there.
    return density.nan_to_num(nan=-torch.inf)


def _of_layers(model: HierarchicalVAE, z: Tensor, x: Tensor) -> Tensor:
    """The sum over layers, each given the layers above of the same code."""
    count, pictures = len(z), len(x)
    density = z.new_zeros(count, pictures)
    states = model.states(z)
    for layer, seen in enumerate(model.way_up(x)):
        mean, logvar = model.posterior_moments(
            layer,
            states[layer].repeat_interleave(pictures, 0),
            seen.repeat(count, 1),
        )
        part = z.split(model.latents, 1)[layer].repeat_interleave(pictures, 0)
        density += DiagonalGaussian(mean, logvar).log_prob(part).reshape(count, pictures)
    return density
