"""exp, expm1 and phi from one range reduction, log, and the Gaussian formulas made of them.

Everything is `tl.fma`, bit casts and comparisons: no libdevice, no inline assembly, hence the same
code for NVIDIA, AMD and the interpreter. The dtype of the argument picks the coefficients: float32
(minimax) or float64 (Taylor).
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)

# ln 2 in two parts: |n| times the high part is exact, so the reduction does not lean on a fused
# multiply-add.
_LN2_HIGH_32 = tl.constexpr(0.693145751953125)
_LN2_LOW_32 = tl.constexpr(1.42860677e-6)
_LN2_HIGH_64 = tl.constexpr(0.69314718036912381649)
_LN2_LOW_64 = tl.constexpr(1.90821492927058770002e-10)
_LN2 = tl.constexpr(0.6931471805599453)

# Adding 1.5 * 2**23 (1.5 * 2**52) rounds to an integer; the exponent bias on top makes the low bits
# those of 2**n.
_ROUND_BIASED_32 = tl.constexpr(12582912.0 + 127.0)
_ROUND_BIASED_64 = tl.constexpr(6755399441055744.0 + 1023.0)

# (e**r - 1 - r) / r**2, highest degree first; |r| <= ln(2) / 2.
_EXP_32 = tl.constexpr(
    (0.000198578025, 0.00139336067, 0.00833336078, 0.0416664667, 0.166666672, 0.5)
)
_EXP_64 = tl.constexpr(tuple(1.0 / math.factorial(n) for n in range(15, 1, -1)))

# (ln(1 + t) - t) / t**2 on [sqrt(1/2) - 1, sqrt(2) - 1], highest degree first.
_LOG_32 = tl.constexpr(
    (
        0.087348409,
        -0.143075213,
        0.149179742,
        -0.165705085,
        0.199620724,
        -0.250017554,
        0.333339512,
        -0.499999911,
    )
)
# (atanh(s) / s - 1) / s**2 in powers of s**2
_ATANH_64 = tl.constexpr(tuple(1.0 / n for n in range(27, 1, -2)))
_LN2_PER_EXPONENT_BIT_32 = tl.constexpr(math.log(2.0) * 2.0**-23)
_LN2_PER_EXPONENT_BIT_64 = tl.constexpr(math.log(2.0) * 2.0**-52)
_SMALLEST_NORMAL_32 = tl.constexpr(2.0**-126)
_SMALLEST_NORMAL_64 = tl.constexpr(2.0**-1022)

INFINITY = tl.constexpr(math.inf)
LOG_2PI = tl.constexpr(1.8378770664093453)

# The largest |logvar / 2| for which `exponentials` needs no care at the ends of the range: 2**n
# stays normal.
BOUNDED_HALF_LOGVAR = 86.0


@triton.constexpr_function
def _count(coefficients):
    return len(coefficients)


@triton.jit
def polynomial(x, coefficients: tl.constexpr):
    """Horner's scheme, highest degree first. The coefficients keep the precision of x."""
    p = tl.full([], coefficients[0], x.dtype)
    for i in tl.static_range(1, _count(coefficients)):
        p = tl.fma(p, x, tl.full([], coefficients[i], x.dtype))
    return p


@triton.jit
def reduced(h, BOUNDED: tl.constexpr):
    """(n, 2**n, r, q): h = n ln 2 + r, and q is r, or a finite stand-in where 2**n is 0.

    BOUNDED promises |h| <= BOUNDED_HALF_LOGVAR. Otherwise n is held to where 2**n runs from 0 to
    the largest power, and r takes the rest: upwards everything overflows as it should; downwards,
    what is multiplied by 0 must stay finite.
    """
    if h.dtype == tl.float64:
        biased = tl.fma(
            h, tl.full([], _LOG2_E, tl.float64), tl.full([], _ROUND_BIASED_64, tl.float64)
        )
        if not BOUNDED:
            biased = tl.minimum(
                tl.maximum(biased, _ROUND_BIASED_64 - 1023.0), _ROUND_BIASED_64 + 1023.0
            )
        n = biased - _ROUND_BIASED_64
        power = (biased.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
        r = tl.fma(n, tl.full([], -_LN2_HIGH_64, tl.float64), h)
        r = tl.fma(n, tl.full([], -_LN2_LOW_64, tl.float64), r)
    else:
        biased = tl.fma(h, _LOG2_E, _ROUND_BIASED_32)
        if not BOUNDED:
            biased = tl.minimum(
                tl.maximum(biased, _ROUND_BIASED_32 - 127.0), _ROUND_BIASED_32 + 127.0
            )
        n = biased - _ROUND_BIASED_32
        power = (biased.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        r = tl.fma(n, -_LN2_HIGH_32, h)
        r = tl.fma(n, -_LN2_LOW_32, r)
    q = r
    if not BOUNDED:
        q = tl.maximum(r, -1.0, propagate_nan=tl.PropagateNan.ALL)
    return n, power, r, q


@triton.jit
def exp_tail(r):
    """(e**r - 1 - r) / r**2."""
    if r.dtype == tl.float64:
        return polynomial(r, _EXP_64)
    else:
        return polynomial(r, _EXP_32)


@triton.jit
def exponentials(h, BOUNDED: tl.constexpr):
    """e**h, e**h - 1 and phi(2 h) = e**(2 h) - 1 - 2 h, the latter without cancellation and never
    negative.

    BOUNDED as in `reduced`; without it e**h runs to 0 and infinity, phi to -1 - 2 h and infinity.
    The order of operations keeps phi within 4 ulp in float32: with P = 2**n, r = h - n ln 2 and p =
    e**r - 1 - r, phi = (P (r + p) + (P - 1))**2 + 2 (P p + ((P - 1) r + (P - 1 - n ln 2))).
    """
    n, power, r, q = reduced(h, BOUNDED)
    p = (q * q) * exp_tail(q)
    less_one = power - 1.0
    q = q + p
    e = tl.fma(power, q, power)
    w = tl.fma(power, q, less_one)
    half_phi = tl.fma(n, tl.full([], -_LN2, h.dtype), less_one)
    half_phi = tl.fma(less_one, r, half_phi)
    half_phi = tl.fma(power, p, half_phi)
    return e, w, tl.fma(w, w, 2.0 * half_phi)


@triton.jit
def exponential(h):
    """e**h, where nothing else of it is wanted."""
    _, power, _, q = reduced(h, False)
    less_one = q * tl.fma(q, exp_tail(q), 1.0)
    return tl.fma(power, less_one, power)


@triton.jit
def log1p_near(t):
    """log(1 + t) for 1 + t from sqrt(1/2) to sqrt(2), to a relative error of 2 ulp."""
    if t.dtype == tl.float64:
        s = t / (t + 2.0)
        s2 = s * s
        return 2.0 * tl.fma(s * s2, polynomial(s2, _ATANH_64), s)
    else:
        return tl.fma(t * t, polynomial(t, _LOG_32), t)


@triton.jit
def logarithm_of_normal(v):
    """log(v) of a normal positive number, as good near 1 as anywhere."""
    if v.dtype == tl.float64:
        bits = v.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) & -0x0010000000000000
        log = log1p_near((bits - exponent).to(tl.float64, bitcast=True) - 1.0)
        per_bit = tl.full([], _LN2_PER_EXPONENT_BIT_64, tl.float64)
        return tl.fma(exponent.to(tl.float64), per_bit, log)
    else:
        bits = v.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) & -0x00800000
        log = log1p_near((bits - exponent).to(tl.float32, bitcast=True) - 1.0)
        return tl.fma(exponent.to(tl.float32), _LN2_PER_EXPONENT_BIT_32, log)


@triton.jit
def logarithm(v):
    """log(v) of v >= 0: minus infinity at 0; subnormal numbers, infinity and not-a-number as they
    should be."""
    smallest: tl.constexpr = _SMALLEST_NORMAL_64 if v.dtype == tl.float64 else _SMALLEST_NORMAL_32
    subnormal = v < smallest
    log = logarithm_of_normal(tl.where(subnormal, v * 2.0**64, v))
    log = tl.where(subnormal, log - tl.full([], 64.0 * _LN2, v.dtype), log)
    log = tl.where(v == 0.0, -INFINITY, log)
    return tl.where(v < INFINITY, log, v)


@triton.jit
def log1p_of_fraction(y):
    """log(1 + y) for 0 <= y <= 1."""
    upper = y > 0.4142
    log = log1p_near(tl.where(upper, 0.5 * (y - 1.0), y))
    return tl.where(upper, log + tl.full([], _LN2, y.dtype), log)


@triton.jit
def quotient(a, b):
    """a / b rounded to nearest: Triton's own division of float32 is approximate."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def clamp(logvar, lowest, highest):
    """As torch.clamp: not-a-number passes through."""
    at_least = tl.maximum(logvar, lowest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(at_least, highest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def expm1_of_double(w):
    """e**(2 h) - 1 from w = e**h - 1."""
    return tl.fma(w, w, 2.0 * w)


@triton.jit
def from_bits(bits, dtype: tl.constexpr):
    """A host double that came as an int64 with its bits: Triton passes floats in float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)
