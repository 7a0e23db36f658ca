"""The noise contract on the GPU: Philox4x32-10 words and Box-Muller normals, in memory order.

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Every counter gives
four words and so four normals; `tl.join` and `tl.reshape` put them next to each other inside one
thread, which moves no data.
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import math

import triton
import triton.language as tl

from .formulas import logarithm_of_normal, polynomial
from .tiles import kernel

_SQRT_2 = math.sqrt(2.0)
_ROUND_32 = tl.constexpr(
    12582912.0
)  # adding it rounds to an integer, whose lowest bit is that of the sum
_ROUND_64 = tl.constexpr(6755399441055744.0)

# sqrt(2) sin(pi y) / y and sqrt(2) cos(pi y), in powers of y**2, for |y| <= 1/2. The square root of
# 2 is the radius's.
_SIN_32 = tl.constexpr(
    tuple(_SQRT_2 * c for c in (0.0775603876, -0.598242104, 2.55006981, -5.16770983, 3.14159274))
)
_COS_32 = tl.constexpr(  # over 1 - 4 y**2
    tuple(_SQRT_2 * c for c in (0.0060288175, -0.0571802445, 0.31949684, -0.934801996, 1.0))
)
_SIN_64 = tl.constexpr(
    tuple(
        _SQRT_2 * (-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1)
        for k in range(12, -1, -1)
    )
)
_COS_64 = tl.constexpr(
    tuple(
        _SQRT_2 * (-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k) for k in range(12, -1, -1)
    )
)


@triton.jit
def philox(counter, sample, key):
    """The four uint32 words of uint64 counters at one sample index; `key` as from `load_key`."""
    key_low, key_high, stream = key
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = sample
    c3 = stream
    for _ in tl.static_range(10):
        # 64-bit products of 32-bit words: one wide multiplication gives both halves.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key_low
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key_low = key_low + tl.full([], 0x9E3779B9, tl.uint32)
        key_high = key_high + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller_32(radius_word, angle_word):
    """Two float32 normals; within 4e-7 (1 + |normal|) of the formula's exact value."""
    u = tl.fma(radius_word.to(tl.float32), 2.0**-32, 2.0**-33)
    radius = tl.sqrt(-logarithm_of_normal(u))

    half_turns = tl.fma(angle_word.to(tl.float32), 2.0**-31, 2.0**-32)
    rounded = half_turns + _ROUND_32
    y = half_turns - (rounded - _ROUND_32)
    flip = rounded.to(tl.int32, bitcast=True) << 31
    radius = (radius.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    y2 = y * y
    cos = tl.fma(y2, -4.0, 1.0) * polynomial(y2, _COS_32)
    sin = y * polynomial(y2, _SIN_32)
    return radius * cos, radius * sin


@triton.jit
def box_muller_64(radius_word, angle_word):
    """Two float64 normals from the same words."""
    scale = tl.full([], 2.0**-32, tl.float64)
    u = tl.fma(radius_word.to(tl.float64), scale, scale * 0.5)
    radius = tl.sqrt(-logarithm_of_normal(u))

    half_turns = tl.fma(angle_word.to(tl.float64), scale * 2.0, scale)
    rounded = half_turns + _ROUND_64
    y = half_turns - (rounded - _ROUND_64)
    flip = rounded.to(tl.int64, bitcast=True) << 63
    radius = (radius.to(tl.int64, bitcast=True) ^ flip).to(tl.float64, bitcast=True)
    y2 = y * y
    return radius * polynomial(y2, _COS_64), radius * (y * polynomial(y2, _SIN_64))


@triton.jit
def four_normals(counter, sample, key, DTYPE: tl.constexpr):
    w0, w1, w2, w3 = philox(counter, sample, key)
    if tl.float64 == DTYPE:
        e0, e1 = box_muller_64(w0, w1)
        e2, e3 = box_muller_64(w2, w3)
    else:
        e0, e1 = box_muller_32(w0, w1)
        e2, e3 = box_muller_32(w2, w3)
    return e0, e1, e2, e3


@triton.jit
def normals(
    group,
    sample,
    key,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The normals of a [ROWS, WIDTH] tile, given the uint64 [ROWS, WIDTH / LANES] indices of its
    groups of LANES elements.

    LANES is 4 (one counter each) or 8 (two counters each, so that a group of half-precision numbers
    is 16 bytes too).
    """
    if LANES == 4:
        e0, e1, e2, e3 = four_normals(group, sample, key, DTYPE)
        lanes = tl.join(tl.join(e0, e2), tl.join(e1, e3))
    else:
        counter = group << 1
        e0, e1, e2, e3 = four_normals(counter, sample, key, DTYPE)
        e4, e5, e6, e7 = four_normals(counter | 1, sample, key, DTYPE)
        even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
        odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
        lanes = tl.join(even, odd)
    return tl.reshape(lanes, [ROWS, WIDTH])


@triton.jit
def load_key(seed_ptr, seed_value, stream):
    """(low word, high word, stream) as uint32; the seed comes from device memory where it lives
    there.
    """
    seed = seed_value
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    seed = seed.to(tl.int64).to(tl.uint64, bitcast=True)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), stream.to(tl.uint32)


@kernel
def noise_words_kernel(
    seed_ptr,
    words_ptr,
    noise_stream: tl.int64,
    sample: tl.int64,
    first: tl.int64,
    count: tl.int64,
    BLOCK: tl.constexpr,
):
    """words[i, :] = the Philox words of counter first + i, as int64."""
    key = load_key(seed_ptr, 0, noise_stream)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter = (first + i).to(tl.uint64)
    w0, w1, w2, w3 = philox(counter, sample.to(tl.uint32), key)
    mask = i < count
    tl.store(words_ptr + 4 * i, w0.to(tl.int64), mask=mask)
    tl.store(words_ptr + 4 * i + 1, w1.to(tl.int64), mask=mask)
    tl.store(words_ptr + 4 * i + 2, w2.to(tl.int64), mask=mask)
    tl.store(words_ptr + 4 * i + 3, w3.to(tl.int64), mask=mask)


@triton.jit
def _mix(v):
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    v = (v ^ (v >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    v = (v ^ (v >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return v ^ (v >> 31)


@kernel
def fold_seed_kernel(seed_ptr, out_ptr, data: tl.int64):
    """out = mix(mix(seed + golden) + data * golden), modulo 2**64."""
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    mixed = _mix(_mix(seed + golden) + data.to(tl.int64).to(tl.uint64, bitcast=True) * golden)
    tl.store(out_ptr, mixed.to(tl.int64, bitcast=True))
