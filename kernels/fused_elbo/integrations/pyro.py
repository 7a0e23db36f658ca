"""Pyro: the KL of Normals on the kernels, and a Normal for models and guides.

    from fused_elbo.integrations import pyro as fused_pyro

    fused_pyro.apply()

registers KL(Normal || Normal), which `TraceMeanField_ELBO` then uses, also for ``.to_event(n)``.
`FusedNormal` is `pyro.distributions.Normal` with samples and densities that are kernels, for
``pyro.sample("z", FusedNormal(loc, scale).to_event(1))``; it needs no `apply`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from . import distributions
from ._patching import peer

__all__ = ["FusedNormal", "applied", "apply", "undo"]

_TorchDistributionMixin: Any = peer(
    "pyro", "pyro-ppl", "pyro.distributions.torch_distribution"
).TorchDistributionMixin


class FusedNormal(distributions.FusedNormal, _TorchDistributionMixin):  # type: ignore[misc]
    """`pyro.distributions.Normal` whose samples and densities are kernels; see
    `fused_elbo.integrations.distributions.FusedNormal`."""


def apply() -> None:
    """Register the KL, for the whole process, until `undo`. Pyro's own remain for all other
    distributions.

    Raises:
        RuntimeError: a torch whose registry is another.
    """
    distributions.apply()


def undo() -> None:
    """Put back the KL that was registered before, unless another has been since."""
    distributions.undo()


def applied() -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads."""
    return distributions.applied()
