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
    variant, only what the launcher passes as a constant (and strides of 2**27 elements and more,
    which are 64 bits wide). Triton would still look into the layouts, whose strides therefore come
    multiplied by STRIDE_SCALE: never 1, always divisible by 16."""
    parameters = inspect.signature(fn).parameters
    variable = [name for name, p in parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=variable)(fn)


STRIDE_SCALE = tl.constexpr(geometry.STRIDE_SCALE)

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
def stride(scaled):
    """A stride of a layout in elements."""
    return scaled // STRIDE_SCALE


@triton.jit
def row_start(row, layout):
    """The element offset at which rows (int64) begin."""
    return row * stride(layout.row)


@triton.jit
def tile_at(
    begin, i, low, high, inner, WIDTH: tl.constexpr, LANES: tl.constexpr, LANE_ALIGNED: tl.constexpr
):
    """Where tile i of a program is: (begin, i, high, inner, mask).

    Its event elements are begin [ROWS, 1] + i * WIDTH + arange(WIDTH); those counted from `low`
    (None: 0) to below `high` exist, and the mask [ROWS, WIDTH] tells which. `inner` is the size
    that the PLANE kinds divide by. Where LANES divides the event, whole groups exist or do not: one
    predicate each.
    """
    m = i * WIDTH + tl.arange(0, WIDTH)[None, :]
    if LANE_ALIGNED:
        high = (high // LANES) * LANES  # changes nothing, but tells the compiler so
        mask = m < high
    elif low is not None:
        mask = (m >= low) & (m < high)
    else:
        mask = m < high
    return begin, i, high, inner, mask


@triton.jit
def pointers(
    ptr,
    layout,
    row_offset,
    here,
    ALIGNED: tl.constexpr,
    PACK: tl.constexpr,
    BYTES: tl.constexpr = 16,
):
    """Addresses of a tile `here` (see `tile_at`), for rows that begin at `row_offset`.

    ALIGNED promises groups of BYTES at addresses divisible by BYTES: the only thing that Triton is
    told about alignment, so that nothing but the launcher's decision makes another variant. PACK
    elements are one of what `ptr` points to; of aligned tensors alone.
    """
    begin, i, _, inner, mask = here
    WIDTH: tl.constexpr = mask.shape[1] // PACK
    m = i * WIDTH + tl.arange(0, WIDTH)[None, :]
    if PACK != 1:
        begin = begin // PACK
        row_offset = row_offset // PACK
    if layout.kind == UNIT:
        p = ptr + ((row_offset + begin) + m)
    elif layout.kind == CONSTANT:
        p = ptr + (row_offset + tl.zeros_like(m))
    else:
        # The launcher copies tensors of this kind whose event exceeds 32 bits.
        n = begin.to(tl.int32) + m
        if ALIGNED and layout.kind == UNIT_PLANE:
            GROUP: tl.constexpr = 8 * BYTES // ptr.dtype.element_ty.primitive_bitwidth
            # Changes nothing, but tells the compiler that no group straddles two runs.
            inner = (inner // (GROUP * PACK)) * GROUP
        outer = n // inner
        within = n - outer * inner
        if layout.kind == UNIT_PLANE:
            p = ptr + (row_offset + outer.to(tl.int64) * (stride(layout.outer) // PACK) + within)
        else:
            outer_offset = outer.to(tl.int64) * stride(layout.outer)
            p = ptr + (row_offset + outer_offset + within.to(tl.int64) * stride(layout.inner))
    if ALIGNED and (layout.kind == UNIT or layout.kind == UNIT_PLANE):
        p = tl.multiple_of(p, (1, BYTES))
    return p


@triton.jit
def load(ptr, layout, row_offset, here, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """A tile in the dtype of arithmetic; 0 outside the mask."""
    WIDE: tl.constexpr = ALIGNED and (layout.kind == UNIT or layout.kind == UNIT_PLANE)
    if WIDE and ptr.dtype.element_ty == tl.bfloat16:
        return load_bfloat16(ptr, layout, row_offset, here)
    else:
        p = pointers(ptr, layout, row_offset, here, ALIGNED, 1)
        return tl.load(p, mask=here[4], other=0.0).to(DTYPE)


@triton.jit
def load_bfloat16(ptr, layout, row_offset, here):
    """An aligned tile of bfloat16 as float32, two to a word: one operation for each element, where
    taking the upper half out first would make it two for every other.
    """
    _, i, high, _, mask = here
    ROWS: tl.constexpr = mask.shape[0]
    WIDTH: tl.constexpr = mask.shape[1]
    words_ptr = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    p = pointers(words_ptr, layout, row_offset, here, True, 2)
    exists = i * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :] < high // 2
    words = tl.load(p, mask=exists, other=0)
    even = (words << 16).to(tl.float32, bitcast=True)
    odd = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), [ROWS, WIDTH])


@triton.jit
def counted(ptr, layout, row_offset, here, ALIGNED: tl.constexpr, LANES: tl.constexpr):
    """Which elements of a tile exist and take part: those whose byte of the mask is not 0. Without
    a mask (None), all that exist.

    A group of LANES elements has LANES bytes of mask, which ALIGNED says are one access.
    """
    if ptr is None:
        return here[4]
    elif layout.kind == CONSTANT:
        return here[4] & (tl.load(ptr + row_offset, mask=here[2] > 0, other=0) != 0)
    else:
        p = pointers(ptr, layout, row_offset, here, ALIGNED, 1, LANES)
        return tl.load(p, mask=here[4], other=0) != 0


@triton.jit
def kept(value, takes_part, mask_ptr):
    """0 where an element takes no part, whatever the value; with a mask alone."""
    if mask_ptr is None:
        return value
    else:
        return tl.where(takes_part, value, 0.0)


@triton.jit
def store(ptr, layout, row_offset, here, value, ALIGNED: tl.constexpr):
    """Rounds to the dtype of the tensor, to nearest even."""
    p = pointers(ptr, layout, row_offset, here, ALIGNED, 1)
    tl.store(p, value.to(ptr.dtype.element_ty), mask=here[4])


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
