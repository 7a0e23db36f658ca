"""torch.distributions: the KL of Normals on the kernels, and a Normal that samples on them.

    from fused_elbo.integrations import distributions

    distributions.apply()

registers KL(Normal || Normal) with `torch.distributions`, whose `kl_divergence` every library uses
that is built on it (Pyro, scvi-tools). The KL of `Independent` Normals is torch's sum of that one.
`FusedNormal` is a `Normal` whose ``rsample``, ``sample`` and ``log_prob`` are kernels; it needs no
`apply`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl as _torch_kl

from .._checks import FLOATING
from ..functional import gaussian_kl, gaussian_log_likelihood, reparameterize
from ._patching import Item, Patch, Replacement, refuse_other_parameters

__all__ = ["FusedNormal", "applied", "apply", "undo"]

Rule = Callable[[Any, Any], Tensor]
_NO_SAMPLE_SHAPE = torch.Size()


class FusedNormal(Normal):
    """`torch.distributions.Normal` whose samples and densities are kernels.

    Same arguments, shapes and gradients. Noise is that of `fused_elbo.reparameterize`, from a seed
    drawn from torch's generator; densities of half-precision values are float32.
    """

    def rsample(self, sample_shape: Any = _NO_SAMPLE_SHAPE) -> Tensor:
        """``loc + scale * eps``, ``[*sample_shape, *batch_shape]``; backward regenerates eps."""
        if not _supported(self):
            return super().rsample(sample_shape)
        loc, logstd = _rows(self.loc), _rows(self.scale).log()
        shape = self._extended_shape(sample_shape)
        samples = math.prod(shape[: len(shape) - self.loc.dim()])
        if samples == 0:
            return self.loc + self.loc.new_empty(shape)
        z = reparameterize(
            loc,
            logstd,
            param="logstd",
            num_samples=samples if len(shape) > self.loc.dim() else None,
        )
        return z.to(self.loc.dtype).reshape(shape)

    def sample(self, sample_shape: Any = _NO_SAMPLE_SHAPE) -> Tensor:
        """`rsample` without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density of every element in nats, with gradients for value, loc and scale."""
        if not _supported(self) or not isinstance(value, Tensor) or value.dtype not in FLOATING:
            return super().log_prob(value)  # type: ignore[no-any-return, no-untyped-call]
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.loc.shape)
        value, loc, scale = (_rows(t.expand(shape)) for t in (value, self.loc, self.scale))
        log_prob = gaussian_log_likelihood(
            value, loc, scale.log(), param="logstd", reduction="none"
        )
        return log_prob.reshape(shape)


def apply() -> None:
    """Register the KL with torch.distributions, for the whole process, until `undo`.

    Raises:
        RuntimeError: a torch whose registry is another.
    """
    _patch.apply(None)


def undo() -> None:
    """Put back the KL that was registered before, unless another has been since."""
    _patch.undo()


def applied() -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads."""
    return _patch.applied(None)


def _replacements() -> list[Replacement]:
    registry, memory = _torch_kl._KL_REGISTRY, _torch_kl._KL_MEMOIZE
    upstream: Any = registry.get((Normal, Normal))
    refuse_other_parameters("distributions", "the KL of Normal", upstream, ("p", "q"))
    place = Item(registry, (Normal, Normal), memory.clear)
    return [Replacement(place, _kl_rule(upstream))]


_patch: Patch[None] = Patch(_replacements, None)


def _kl_rule(upstream: Rule) -> Rule:
    def kl_normal_normal(p: Normal, q: Normal) -> Tensor:
        if not _supported(p) or not _supported(q):
            return upstream(p, q)
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        posterior_and_prior = [
            _rows(t.expand(shape)) for t in (p.loc, p.scale.log(), q.loc, q.scale.log())
        ]
        kl = gaussian_kl(*posterior_and_prior, param="logstd", reduction="none")
        return kl.reshape(shape)

    return kl_normal_normal


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() else t.reshape(1)


def _supported(normal: Normal) -> bool:
    """Whether the kernels know the dtype. Traces of torch.jit lose the gradients of operations that
    are not torch's own."""
    return (
        normal.loc.dtype in FLOATING
        and normal.scale.dtype in FLOATING
        and torch._C._get_tracing_state() is None
    )
