"""torch.distributions: the KL of Normals on the kernels, and a Normal that samples on them.

    from fused_elbo.integrations import distributions

    distributions.apply()

registers KL(Normal || Normal) and KL(Independent || Independent) with `torch.distributions`, whose
`kl_divergence` every library uses that is built on it (Pyro, scvi-tools). `FusedNormal` is a
`Normal` whose ``rsample``, ``sample`` and ``log_prob`` are kernels; it needs no `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal
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
    """Register the KLs with torch.distributions, for the whole process, until `undo`.

    Raises:
        RuntimeError: a torch whose registry is another.
    """
    _patch.apply(None)


def undo() -> None:
    """Put back the KLs that were registered before, unless others have been since."""
    _patch.undo()


def applied() -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads."""
    return _patch.applied(None)


def _replacements() -> list[Replacement]:
    registry, memory = _torch_kl._KL_REGISTRY, _torch_kl._KL_MEMOIZE
    pairs = (Normal, Normal), (Independent, Independent)
    for pair in pairs:
        refuse_other_parameters(
            "distributions", f"the KL of {pair[0].__name__}", registry.get(pair), ("p", "q")
        )
    normal_rule = _normal_rule(registry[pairs[0]])
    rules = normal_rule, _independent_rule(registry[pairs[1]], normal_rule)
    return [
        Replacement(Item(registry, pair, memory.clear), rule) for pair, rule in zip(pairs, rules)
    ]


_patch: Patch[None] = Patch(_replacements, None)


def _normal_rule(upstream: Rule) -> Rule:
    def kl_normal_normal(p: Normal, q: Normal) -> Tensor:
        if not _supported(p) or not _supported(q):
            return upstream(p, q)
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        return _kl(p, q, shape, "none").reshape(shape)

    return kl_normal_normal


def _independent_rule(upstream: Rule, normal_rule: Rule) -> Rule:
    def kl_independent_independent(p: Independent[Any], q: Independent[Any]) -> Tensor:
        event_dims = p.reinterpreted_batch_ndims
        if (
            event_dims != q.reinterpreted_batch_ndims
            or event_dims == 0
            or _rule(p.base_dist, q.base_dist) is not normal_rule
            or not _supported(p.base_dist)
            or not _supported(q.base_dist)
        ):
            return upstream(p, q)
        shape = torch.broadcast_shapes(p.base_dist.batch_shape, q.base_dist.batch_shape)
        batch = shape[: len(shape) - event_dims]
        rows = (math.prod(batch), *shape[len(shape) - event_dims :])
        return _kl(p.base_dist, q.base_dist, shape, "sample", rows).reshape(batch)

    return kl_independent_independent


def _kl(
    p: Normal, q: Normal, shape: torch.Size, reduction: str, rows: tuple[int, ...] | None = None
) -> Tensor:
    parameters = (p.loc, p.scale.log(), q.loc, q.scale.log())
    wide = [t.expand(shape) for t in parameters]
    posterior_and_prior = [_rows(t) if rows is None else t.reshape(rows) for t in wide]
    return gaussian_kl(*posterior_and_prior, param="logstd", reduction=reduction)


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() else t.reshape(1)


def _rule(p: Any, q: Any) -> object:
    """The KL that torch would choose: a subclass of Normal may have registered its own."""
    memory, pair = _torch_kl._KL_MEMOIZE, (type(p), type(q))
    if pair not in memory:
        memory[pair] = _torch_kl._dispatch_kl(*pair)
    return memory[pair]


def _supported(normal: Normal) -> bool:
    """Whether the kernels know the dtype. Traces of torch.jit lose the gradients of operations that
    are not torch's own."""
    return (
        normal.loc.dtype in FLOATING
        and normal.scale.dtype in FLOATING
        and torch._C._get_tracing_state() is None
    )
