"""From a scale parameter to the logvar it stands for, and back with the gradient.

What the kinds mean is in `parametrization.py`. Kernels read parameters through here and then
compute in logvar: the Gaussian formulas exist once, and a parametrization moves no bytes of its
own.
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl

from .. import parametrization
from .formulas import (
    INFINITY,
    clamp,
    expm1_of_double,
    exponential,
    exponentials,
    from_bits,
    log1p_of_fraction,
    logarithm,
    quotient,
)

PLAIN = tl.constexpr(parametrization.PLAIN)
LOGSTD = tl.constexpr(parametrization.LOGSTD)
SOFTPLUS_STD = tl.constexpr(parametrization.SOFTPLUS_STD)
VAR = tl.constexpr(parametrization.VAR)
SOFT = tl.constexpr(parametrization.SOFT)


@triton.constexpr_function
def _kind(code):
    return code % parametrization.SOFT


@triton.jit
def scale_numbers(floor, clamp_min, clamp_max, DTYPE: tl.constexpr):
    """What `scale_terms` needs and is the same for every element."""
    lowest = from_bits(clamp_min, DTYPE)
    highest = from_bits(clamp_max, DTYPE)
    half = 0.5 * (highest - lowest)
    one = tl.full([], 1.0, DTYPE)
    return (
        from_bits(floor, DTYPE),
        lowest,
        highest,
        0.5 * (lowest + highest),
        half,
        quotient(one, half),
    )


@triton.jit
def clamped(p, numbers, SCALE: tl.constexpr, CLAMP: tl.constexpr):
    """p within the bounds of its clamp, and the derivative of that."""
    _, lowest, highest, middle, half, per_half = numbers
    if SCALE >= SOFT:
        y = (p - middle) * per_half
        # Beyond 20 tanh is 1.
        size = tl.minimum(tl.abs(y), 20.0, propagate_nan=tl.PropagateNan.ALL)
        _, less_one, _ = exponentials(size, True)
        grown = expm1_of_double(less_one)  # e**(2 |y|) - 1
        inverse = quotient(tl.full([], 1.0, p.dtype), grown + 2.0)
        tanh = grown * inverse
        slope = (4.0 * (grown + 1.0)) * (inverse * inverse)  # 1 - tanh**2, without cancellation
        return tl.fma(half, tl.where(y < 0.0, -tanh, tanh), middle), slope
    elif CLAMP:
        return clamp(p, lowest, highest), ((p >= lowest) & (p <= highest)).to(p.dtype)
    else:
        return p, tl.full([], 1.0, p.dtype)


@triton.jit
def scale_terms(p, numbers, SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOOR: tl.constexpr):
    """(logvar, d logvar / d p) of parameters p.

    SCALE is a code of `parametrization` other than PLAIN. CLAMP: there is a hard clamp. FLOOR: the
    floor is above 0 (of a variance it need not be told).
    """
    floor = numbers[0]
    p, inner = clamped(p, numbers, SCALE, CLAMP)
    KIND: tl.constexpr = _kind(SCALE)
    if KIND == VAR:
        var = tl.maximum(p, floor, propagate_nan=tl.PropagateNan.ALL)
        return logarithm(var), quotient(inner, var)
    elif KIND == SOFTPLUS_STD:
        e = exponential(-tl.abs(p))
        std = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_of_fraction(e)
        if FLOOR:
            std += floor
        log_std = logarithm(std)
        slope = quotient(tl.where(p < 0.0, e, 1.0), (1.0 + e) * std)
        if not FLOOR:
            # Softplus becomes e**p, which underflows where its logarithm does not:
            # log log(1 + e) = p - e / 2 + ...
            far = p < (-18.0 if p.dtype == tl.float64 else -9.0)
            half_e = 0.5 * e
            log_std = tl.where(far, p - half_e, log_std)
            slope = tl.where(far, 1.0 - half_e, slope)
        return 2.0 * log_std, 2.0 * inner * slope
    else:
        factor: tl.constexpr = 2.0 if KIND == LOGSTD else 1.0
        if FLOOR:
            e = exponential(p)
            total = e + floor
            finite = total < INFINITY
            logvar = factor * tl.where(finite, logarithm(total), p)
            return logvar, factor * inner * tl.where(finite, quotient(e, total), 1.0)
        else:
            return factor * p, factor * inner


@triton.jit
def through(slope, gradient):
    """The gradient by a parameter from that by its logvar: none, not even of an infinity, where the
    slope is 0.
    """
    return tl.where(slope == 0.0, 0.0, slope * gradient)
