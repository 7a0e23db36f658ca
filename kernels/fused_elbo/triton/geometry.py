"""Shapes and strides, as the kernels want them: which dimensions merge, what a tensor looks like,
how work is divided.

Plain Python over sizes and strides; neither Triton nor a device is needed here.

Read and written in place, whatever the distance between rows: event dimensions that merge into one
dense run, into one value (expanded), or into two dimensions with any strides: channels_last, a
chunk of any dimension, expanded channels. A tensor whose event needs three or more dimensions next
to the others' is copied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNIT, CONSTANT, PLANE, UNIT_PLANE = range(4)
NOT_WANTED, PER_ELEMENT, PER_ROW = range(3)

THREADS = 128
TILE = 8 * THREADS  # elements of a tile: two groups of 4 per thread, or one of 8
_MAX_ITERATIONS = 8
_MAX_PLANE = 2**31 - 2 * TILE * _MAX_ITERATIONS  # what 32-bit positions inside an event can reach


#: Strides reach the kernels multiplied by this. Triton compiles anew for an integer that is 1 and
#: for one that is divisible by 16, which a batch of one would make of strides that mean nothing.
STRIDE_SCALE = 16


class Layout(NamedTuple):
    """A tensor next to its pointer: compile-time kind, and strides in elements. A tuple argument of
    the kernels (there with strides times `STRIDE_SCALE`).
    """

    kind: Any
    row: int
    channel: int
    outer: int
    inner: int


class Division(NamedTuple):
    """Rows and width of a tile, tiles of a program, programs of a row."""

    rows: int
    width: int
    iterations: int
    splits: int

    def programs(self, rows: int) -> int:
        return -(-rows // self.rows) * self.splits


def lanes(dtype: torch.dtype) -> int:
    """Elements of a noise group: one Philox counter's four normals, two counters' where eight
    elements are 16 bytes.
    """
    return 8 if dtype.itemsize == 2 else 4


def divide(event: int, group: int) -> Division:
    """The heuristic. It sees the event alone, so that a row's sums have the same bits in every
    batch.

    Events of up to TILE elements: as many rows to a program as fill a tile, no second stage. Up to
    four tiles: a program per row, no second stage. Above: about sixteen programs per row or more,
    each of 1 to 8 tiles; large events amortize the round keys, small ones spread over the device.

    Args:
        event: elements of a row.
        group: elements of a noise group (a row may begin anywhere inside one); 1 without noise.
    """
    span = event + group - math.gcd(event, group)
    if span <= TILE:
        width = max(8, 1 << max(span - 1, 0).bit_length())
        return Division(TILE // width, width, 1, 1)
    tiles = -(-span // TILE)
    iterations = tiles if tiles <= 4 else min(_MAX_ITERATIONS, max(1, tiles // 16))
    return Division(1, TILE, iterations, -(-tiles // iterations))


def merge(shape: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Merges neighboring dimensions wherever every tensor's strides allow it; drops dimensions of
    size 1.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        here = [s[dim] for s in strides]
        if sizes and all(m[-1] == h * size for m, h in zip(merged, here)):
            sizes[-1] *= size
            for m, h in zip(merged, here):
                m[-1] = h
        else:
            sizes.append(size)
            for m, h in zip(merged, here):
                m.append(h)
    return sizes, merged


def memory_order(t: Tensor) -> list[int]:
    """The event dimensions of ``[samples, batch, *event]`` from the outermost to the innermost in
    memory.
    """
    return sorted(range(t.dim() - 2), key=lambda d: -t.stride(2 + d))


class Plane(NamedTuple):
    """Merged event dimensions: their layouts without rows, and the size of the inner dimension that
    PLANE divides by.
    """

    inner: int
    layouts: list[Layout]


def plane(sizes: list[int], strides: list[list[int]]) -> Plane | None:
    """The kinds of every tensor over merged event dimensions; None if more than two are left."""
    if len(sizes) > 2 or (len(sizes) == 2 and sizes[0] * sizes[1] > _MAX_PLANE):
        return None
    event = math.prod(sizes)
    inner = sizes[-1] if sizes else 1
    layouts = []
    for s in strides:
        if not any(s):
            layouts.append(Layout(CONSTANT, 0, 0, 0, 0))
        elif (len(sizes) == 1 and s[0] == 1) or (len(sizes) == 2 and s[1] == 1 and s[0] == inner):
            layouts.append(Layout(UNIT, 0, 0, 0, 0))
        elif event > _MAX_PLANE:
            return None
        elif len(sizes) == 1:
            layouts.append(Layout(PLANE, 0, 0, 0, s[0]))
        elif s[1] == 1:
            layouts.append(Layout(UNIT_PLANE, 0, 0, s[0], 0))
        else:
            layouts.append(Layout(PLANE, 0, 0, s[0], s[1]))
    return Plane(inner, layouts)


class Arrangement(NamedTuple):
    """Tensors ``[samples, batch, *event]`` as a kernel takes them, dimensions merged.

    ``rows`` are numbered over samples, batch and channels; `split` says that a kernel has to take a
    row's number apart. ``aligned``: groups of every tensor but the mask can be accessed at once;
    ``mask_aligned``: those of the mask. ``tensors`` and ``layouts`` have the same keys; where a
    copy was made the copy is in ``tensors``, and ``write_back`` holds (output, the copy to read it
    from).
    """

    tensors: dict[str, Tensor | None]
    layouts: dict[str, Layout]
    sample_strides: dict[str, int]
    rows: int
    batch: int
    channels: int
    event: int
    inner: int
    split: bool
    aligned: bool
    mask_aligned: bool
    write_back: list[tuple[Tensor, Tensor]]

    def finish(self) -> None:
        for output, copy in self.write_back:
            output.copy_(copy)


ABSENT = Layout(UNIT, 0, 0, 0, 0)


def arrange(
    tensors: dict[str, Tensor | None],
    outputs: frozenset[str],
    group: int,
    *,
    samples_apart: bool = False,
    channel_dims: int = 0,
    order: list[int] | None = None,
) -> Arrangement:
    """Brings tensors ``[samples, batch, *event]`` into the kernels' form, copying what does not
    fit.

    Args:
        tensors: by name; None stays None. Any dimension may be expanded. A mask is uint8, and the
            only one of that dtype.
        outputs: names of tensors that are written.
        group: elements that a 16-byte access moves, or that share a noise group.
        samples_apart: the kernel itself loops over samples, whose number may differ between
            tensors; rows are those of one sample.
        channel_dims: leading event dimensions (after ``order``) that are numbered with the rows.
        order: a permutation of the event dimensions; None keeps them in place.
    """
    event_dims = next(t.dim() - 2 for t in tensors.values() if t is not None)
    order = list(range(event_dims)) if order is None else order
    in_place = _arrange_in_place(tensors, group, samples_apart, channel_dims, order)
    if in_place is not None:
        return in_place
    copies = dict(tensors)
    write_back = []
    forward = [0, 1, *(2 + d for d in order)]
    for name, t in tensors.items():
        if t is None or _is_simple(t, order):
            continue
        permuted = t.permute(forward)
        if name in outputs:
            dense = torch.empty(permuted.shape, dtype=t.dtype, device=t.device)
        else:
            dense = permuted.contiguous()
        copies[name] = copy = dense.permute([forward.index(d) for d in range(t.dim())])
        if name in outputs:
            write_back.append((t, copy))
    dense_form = _arrange_in_place(copies, group, samples_apart, channel_dims, order)
    assert dense_form is not None, "dense tensors merge into one dimension"
    return dense_form._replace(write_back=write_back)


def _is_simple(t: Tensor, order: list[int]) -> bool:
    """Whether the event of t is one dense run or one value."""
    sizes, (strides,) = merge([t.shape[2 + d] for d in order], [[t.stride(2 + d) for d in order]])
    return not any(strides) or (len(sizes) == 1 and strides[0] == 1)


def _arrange_in_place(
    tensors: dict[str, Tensor | None],
    group: int,
    samples_apart: bool,
    channel_dims: int,
    order: list[int],
) -> Arrangement | None:
    present = {name: t for name, t in tensors.items() if t is not None}
    samples, batch, *event_shape = next(iter(present.values())).shape
    shape = [event_shape[d] for d in order]
    strides = [[t.stride(2 + d) for d in order] for t in present.values()]
    channel_sizes, channel_strides = merge(
        shape[:channel_dims], [s[:channel_dims] for s in strides]
    )
    sizes, event_strides = merge(shape[channel_dims:], [s[channel_dims:] for s in strides])
    flat = plane(sizes, event_strides)
    if flat is None or len(channel_sizes) > 1:
        return None

    if samples_apart:
        samples = 1
    channels, event = math.prod(channel_sizes), math.prod(sizes)
    joint = (
        samples == 1
        or batch == 1
        or all(t.stride(0) == batch * t.stride(1) for t in present.values())
    )
    layouts, sample_strides = {}, {}
    aligned = mask_aligned = event % group == 0
    for (name, t), layout, channel in zip(present.items(), flat.layouts, channel_strides):
        row = t.stride(0) if batch == 1 and samples > 1 else t.stride(1)
        layouts[name] = layout = layout._replace(row=row, channel=channel[0] if channel else 0)
        sample_strides[name] = t.stride(0) if t.shape[0] > 1 else 0
        steps = [sample_strides[name], row, layout.channel, layout.outer]
        wide = _is_aligned(t, layout.kind, steps, flat.inner % group == 0, group)
        if t.dtype == torch.uint8:
            mask_aligned = mask_aligned and wide
        else:
            aligned = aligned and wide
    return Arrangement(
        tensors=tensors,
        layouts={name: layouts.get(name, ABSENT) for name in tensors},
        sample_strides={name: sample_strides.get(name, 0) for name in tensors},
        rows=samples * batch * channels,
        batch=batch,
        channels=channels,
        event=event,
        inner=flat.inner if event <= _MAX_PLANE else 1,
        split=channels > 1 or not joint,
        aligned=aligned,
        mask_aligned=mask_aligned,
        write_back=[],
    )


def _is_aligned(
    tensor: Tensor, kind: int, steps: list[int], whole_groups: bool, group: int
) -> bool:
    """Whether every group of elements of this tensor lies at an address divisible by its size, or
    by 16 bytes if it is larger.
    """
    if kind in (CONSTANT, PLANE):
        return True  # read element by element in any case
    size = min(16, group * tensor.element_size())
    if any(step * tensor.element_size() % size for step in steps) or (
        kind == UNIT_PLANE and not whole_groups
    ):
        return False
    start = tensor.storage_offset() * tensor.element_size() if tensor.is_meta else tensor.data_ptr()
    return start % size == 0
