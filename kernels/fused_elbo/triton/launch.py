"""Launching: one place through which every kernel goes, so that the same calls can run, warm up or
compile ahead of time.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..parametrization import PLAIN, SOFT, VAR, ScaleParams
from ..schemas import BATCHMEAN, NO_CLAMP, SAMPLE, SUM
from . import geometry
from .reduction import add_blocks_kernel, add_rows_kernel

_WAVE = 64  # AMD's data-center GPUs


def options(warp_size: int) -> dict[str, Any]:
    """Compile options of every kernel, for the device's warp size.

    Fusion is written out with `tl.fma` and never left to the compiler: the same bits in every
    variant, and Triton's default has changed between releases.
    """
    return {"num_warps": geometry.THREADS // warp_size, "num_stages": 1, "enable_fp_fusion": False}


@functools.cache
def device_options(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or torch.version.hip is None:
        return options(32)
    return options(getattr(torch.cuda.get_device_properties(device), "warp_size", _WAVE))


_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Launch(NamedTuple):
    """One kernel launch: the jitted function, programs in the grid, arguments by name."""

    kernel: Any
    programs: int
    args: dict[str, Any]


_recorder: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects launches instead of running them. Use tensors on the meta device, so that nothing is
    allocated.
    """
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def launch(kernel: Any, programs: int, device: torch.device, **args: Any) -> None:
    """Runs a kernel on the current stream of a device."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, args))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](**args, **device_options(device))
    else:
        kernel[(programs,)](**args, **device_options(device))


def bits(value: float) -> int:
    """The bits of a double as an int64: how a number reaches a kernel without being rounded to
    float32.
    """
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def triton_dtype(accumulate: torch.dtype) -> Any:
    return _TRITON_DTYPES[accumulate]


def operand(name: str, tensor: Tensor | None, layout: geometry.Layout) -> dict[str, Any]:
    """The two arguments that stand for a tensor: its pointer and its layout."""
    kind, *strides = layout
    scaled = [stride * geometry.STRIDE_SCALE for stride in strides]
    return {f"{name}_ptr": tensor, name: geometry.Layout(tl.constexpr(kind), *scaled)}


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it."""
    return None if mask is None else mask.view(torch.uint8)


def scale_arguments(scale: ScaleParams) -> dict[str, Any]:
    """A parametrization: numbers, and what of it is compiled in."""
    code, floor, lowest, highest = scale
    clamp = lowest > -NO_CLAMP or highest < NO_CLAMP
    return {
        "floor": bits(floor),
        "clamp_min": bits(lowest),
        "clamp_max": bits(highest),
        "SCALE": code,
        "CLAMP": clamp and code < SOFT,
        "FLOOR": floor > 0 and code % SOFT not in (PLAIN, VAR),
    }


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_tile(parts: int) -> tuple[int, int]:
    """Rows and width of a second-stage tile, from the number of parts alone."""
    width = min(power_of_two(parts), geometry.TILE)
    return min(64, geometry.TILE // width), width


def add_rows(parts: Tensor, rows: int, out: Tensor) -> None:
    """out[r] = the sum over parts[r, :]."""
    tile_rows, width = row_tile(parts.numel() // rows)
    launch(
        add_rows_kernel,
        -(-rows // tile_rows),
        parts.device,
        parts_ptr=parts,
        out_ptr=out,
        rows=rows,
        parts=parts.numel() // rows,
        ROWS=tile_rows,
        WIDTH=width,
        DTYPE=triton_dtype(parts.dtype),
    )


_BLOCKS = 8  # of TILE parts each, in one program of `add_all`


def add_all(parts: Tensor, out: Tensor) -> None:
    """out = the sum of all parts, by as many rounds as it takes to get down to one program."""
    span = _BLOCKS * geometry.TILE
    while True:
        programs = -(-parts.numel() // span)
        sums = out if programs == 1 else parts.new_empty(programs)
        launch(
            add_blocks_kernel,
            programs,
            parts.device,
            parts_ptr=parts,
            out_ptr=sums,
            count=parts.numel(),
            BLOCKS=_BLOCKS,
            WIDTH=geometry.TILE,
            DTYPE=triton_dtype(parts.dtype),
        )
        if programs == 1:
            return
        parts = sums


class Sums:
    """Where the sums of a kernel go: straight to the output where one program has them whole, else
    by a second stage.
    """

    def __init__(self, out: Tensor, reduction: int, rows: int, division: geometry.Division) -> None:
        """``rows`` are the kernel's; several of them may make one value of ``out``."""
        self.out, self.reduction = out, reduction
        self.parts: Tensor | None = None
        if reduction == SAMPLE:
            self.parts = self._parts(rows * division.splits)
        elif reduction in (SUM, BATCHMEAN):
            self.parts = self._parts(division.programs(rows))

    def _parts(self, count: int) -> Tensor:
        return self.out if count == self.out.numel() else self.out.new_empty(count)

    def finish(self) -> None:
        if self.parts is None or self.parts is self.out:
            return
        if self.reduction == SAMPLE:
            add_rows(self.parts, self.out.numel(), self.out)
        else:
            add_all(self.parts, self.out)


def kernel_reduction(reduction: int) -> int:
    """The kernels' code: sum and batchmean differ by a scale only."""
    return SUM if reduction == BATCHMEAN else reduction


def empty_sum(out: Tensor, rows: int, reduction: int) -> Tensor:
    """What a reduction over no elements gives: 0, and not-a-number for the mean over no rows."""
    return out.fill_(math.nan if reduction == BATCHMEAN and rows == 0 else 0.0)
