"""What a network's scale output stands for: log-variance, log-standard-deviation, or a positive
function of it.

One parametrization describes every scale argument of a call, the posterior's and the prior's alike.
Kernels turn the parameter into a log-variance as they read it, and carry the gradient back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Parametrization"]


class Parametrization(NamedTuple):
    """How a parameter p gives a standard deviation. First the clamp, then by name:

    ================  ==================================  ============================
    name              standard deviation                  as in
    ================  ==================================  ============================
    ``logvar``        std**2 = exp(p) + floor             arXiv 1312.6114, scvi-tools
    ``logstd``        std = exp(p) + floor                VDVAE, NVAE, VITS
    ``softplus_std``  std = log(1 + exp(p)) + floor       Stable Audio, world models
    ``var``           std**2 = max(p, floor)              `F.gaussian_nll_loss`
    ================  ==================================  ============================

    Args:
        name: one of the four.
        floor: a number >= 0. Below the floor of ``var`` the gradient passes as if there were none,
            as in `F.gaussian_nll_loss`.
        clamp: ``(low, high)``, applied to p first; None: no clamp.
        soft_clamp: False clamps as `torch.clamp`, with zero gradient outside; True bends smoothly,
            ``middle + half * tanh((p - middle) / half)`` with middle and half-width of the range
            (``5 * tanh(p / 5)`` for (-5, 5); NVAE, arXiv 2007.03898).
    """

    name: str = "logvar"
    floor: float = 0.0
    clamp: tuple[float, float] | None = None
    soft_clamp: bool = False


class ScaleParams(NamedTuple):
    """A parametrization as the raw operations take it."""

    code: int = 0
    floor: float = 0.0
    clamp_min: float = -math.inf
    clamp_max: float = math.inf


# PLAIN: logvar itself, the posterior's hard-clamped and the prior's as it is. All others describe
# posterior and prior alike; SOFT is added to them.
PLAIN, LOGVAR, LOGSTD, SOFTPLUS_STD, VAR = range(5)
SOFT = 8
_CODES = {"logvar": LOGVAR, "logstd": LOGSTD, "softplus_std": SOFTPLUS_STD, "var": VAR}
PLAIN_SCALE = ScaleParams()


def parametrization(function: str, label: str, value: object) -> Parametrization:
    """A ``param=`` argument, checked.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, str):
        value = Parametrization(value)
    if not isinstance(value, Parametrization):
        raise TypeError(
            f"{function}: {label} must be a name or a fused_elbo.Parametrization, "
            f"got {type(value).__name__}"
        )
    name, floor, clamp, soft = value
    if name not in _CODES:
        names = ", ".join(f'"{known}"' for known in _CODES)
        raise ValueError(f"{function}: {label} must be one of {names}, got {name!r}")
    if not 0 <= floor < math.inf:
        raise ValueError(f"{function}: the floor of {label} must be at least 0, got {floor!r}")
    if clamp is not None and not clamp[0] <= clamp[1]:
        raise ValueError(
            f"{function}: the clamp of {label} must be (low, high) with low <= high, got {clamp!r}"
        )
    if soft and (clamp is None or not -math.inf < clamp[0] < clamp[1] < math.inf):
        raise ValueError(
            f"{function}: a soft clamp of {label} needs (low, high) with finite low < high, "
            f"got {clamp!r}"
        )
    return value


def scale_params(param: Parametrization, with_prior: bool) -> ScaleParams:
    """What the raw operations take. ``with_prior``: the call has a prior of the same kind."""
    name, floor, clamp, soft = param
    low, high = (-math.inf, math.inf) if clamp is None else (float(clamp[0]), float(clamp[1]))
    code = _CODES[name]
    if code == LOGVAR and floor == 0 and not soft and (clamp is None or not with_prior):
        code = PLAIN
    return ScaleParams(code + SOFT if soft else code, float(floor), low, high)
