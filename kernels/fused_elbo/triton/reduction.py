"""The second stage of the sums: parts that programs left behind, added in an order that depends on
their number alone.

No atomics: every run, and every batch a row is part of, gives the same bits.
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl

from .tiles import first_row, kernel


@triton.jit
def add_up(
    parts_ptr, row, rows, parts, ROWS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr
):
    """The sums [ROWS, 1] of rows of `parts` numbers."""
    total = tl.zeros([ROWS, WIDTH], DTYPE)
    for begin in range(0, parts, WIDTH):
        part = begin + tl.arange(0, WIDTH)[None, :]
        mask = (row < rows) & (part < parts)
        total += tl.load(parts_ptr + (row * parts + part), mask=mask, other=0.0).to(DTYPE)
    return tl.sum(total, axis=1, keep_dims=True)


@kernel
def add_rows_kernel(
    parts_ptr,
    out_ptr,
    rows: tl.int64,
    parts: tl.int32,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out[r] = the sum of parts[r, :]."""
    row = first_row(tl.program_id(0).to(tl.int64), 1, ROWS)
    total = add_up(parts_ptr, row, rows, parts, ROWS, WIDTH, DTYPE)
    tl.store(out_ptr + row, total, mask=row < rows)


@kernel
def add_blocks_kernel(
    parts_ptr,
    out_ptr,
    count: tl.int64,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out[p] = the sum of the p-th run of BLOCKS * WIDTH parts."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WIDTH], DTYPE)
    for i in range(BLOCKS):
        part = (program * BLOCKS + i) * WIDTH + tl.arange(0, WIDTH)
        total += tl.load(parts_ptr + part, mask=part < count, other=0.0).to(DTYPE)
    tl.store(out_ptr + program, tl.sum(total, axis=0))
