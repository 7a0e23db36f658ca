"""How a program finds its elements: tiles of rows, and operands with strides of their own.

A program owns WIDTH * iterations consecutive event elements of ROWS rows and walks over them in
[ROWS, WIDTH] tiles. Addresses are 64 bits wide; within a program, positions are 32 bits.

A tensor is a pointer and a `geometry.Layout`: strides and a compile-time kind, which says what its
collapsed event dimensions look like.
- UNIT: dense, one element after the other (rows may be any distance apart),
- CONSTANT: one value for the whole event of a row (an expanded tensor),
- PLANE: two dimensions [event / inner, inner] with any two strides (channels_last, expanded
  channels),
- UNIT_PLANE: the same with an inner stride of 1 (a chunk of the last dimension).
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from . import geometry


def kernel(fn: Callable[..., None]) -> Any:
    """`triton.jit` for what is launched: neither the value nor the alignment of an argument makes a
    variant, only what the launcher passes as a constant (and a stride of 1 or divisible by 16)."""
    parameters = inspect.signature(fn).parameters
    variable = [name for name, p in parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=variable)(fn)


UNIT = tl.constexpr(geometry.UNIT)
CONSTANT = tl.constexpr(geometry.CONSTANT)
PLANE = tl.constexpr(geometry.PLANE)
UNIT_PLANE = tl.constexpr(geometry.UNIT_PLANE)

# Codes of `reduction`, as in the schemas; sum and batchmean differ by a scale only and are both
# TOTAL here.
OFF = tl.constexpr(-1)
NONE = tl.constexpr(0)
SAMPLE = tl.constexpr(1)
TOTAL = tl.constexpr(2)


@triton.jit
def first_row(program, splits, ROWS: tl.constexpr):
    """The rows [ROWS, 1] of a program, as int64; `program % splits` is its place within them."""
    return (program // splits) * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def pointers(ptr, layout, row_offset, here, ALIGNED: tl.constexpr):
    """Addresses of a tile, for rows that begin at `row_offset`.

    `here` is (begin, m, mask, inner): m [1, WIDTH] counts from event element `begin` [ROWS, 1]; the
    mask tells which elements exist; `inner` is the size that the PLANE kinds divide by.

    ALIGNED promises groups of 16 bytes at addresses divisible by 16: the only thing that Triton is
    told about alignment, so that nothing but the launcher's decision makes another variant.
    """
    begin, m, _, inner = here
    if layout.kind == UNIT:
        p = ptr + ((row_offset + begin) + m)
    elif layout.kind == CONSTANT:
        p = ptr + (row_offset + tl.zeros_like(m))
    else:
        # The launcher copies tensors of this kind whose event exceeds 32 bits.
        n = begin.to(tl.int32) + m
        if ALIGNED and layout.kind == UNIT_PLANE:
            GROUP: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
            inner = (
                inner // GROUP
            ) * GROUP  # changes nothing, but tells the compiler that no group straddles two runs
        outer = n // inner
        within = n - outer * inner
        if layout.kind == UNIT_PLANE:
            p = ptr + (row_offset + outer.to(tl.int64) * layout.outer + within)
        else:
            p = ptr + (
                row_offset + outer.to(tl.int64) * layout.outer + within.to(tl.int64) * layout.inner
            )
    if ALIGNED and (layout.kind == UNIT or layout.kind == UNIT_PLANE):
        p = tl.multiple_of(p, (1, 16))
    return p


@triton.jit
def load(ptr, layout, row_offset, here, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """A tile in the dtype of arithmetic; 0 outside the mask."""
    p = pointers(ptr, layout, row_offset, here, ALIGNED)
    return tl.load(p, mask=here[2], other=0.0).to(DTYPE)


@triton.jit
def store(ptr, layout, row_offset, here, value, ALIGNED: tl.constexpr):
    """Rounds to the dtype of the tensor, to nearest even."""
    p = pointers(ptr, layout, row_offset, here, ALIGNED)
    tl.store(p, value.to(ptr.dtype.element_ty), mask=here[2])


@triton.jit
def add_columns(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """The sums [ROWS, 1] of a [ROWS, WIDTH] tile, in one order for every variant.

    The order of `tl.sum` follows the tile's layout, which follows the width of the loads. Adding
    the lanes of every group first leaves one number per thread and group in either case, and so the
    same bits for aligned and misaligned tensors.
    """
    COUNT: tl.constexpr = WIDTH // LANES
    if LANES == 8:
        even, odd = tl.split(tl.reshape(tile, [ROWS, COUNT * 4, 2]))
        tile = even + odd
    even, odd = tl.split(tl.reshape(tile, [ROWS, COUNT * 2, 2]))
    even, odd = tl.split(tl.reshape(even + odd, [ROWS, COUNT, 2]))
    return tl.sum(even + odd, axis=1, keep_dims=True)
