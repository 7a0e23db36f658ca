"""How tensors are laid out for the kernels, and how work is divided: plain arithmetic, without
Triton.
"""

from __future__ import annotations

import math

import pytest
import torch

from fused_elbo.triton import geometry
from fused_elbo.triton.geometry import CONSTANT, PLANE, TILE, UNIT, UNIT_PLANE, arrange, divide

NOTHING = frozenset[str]()


def arranged(
    *tensors: torch.Tensor, group: int = 4, order: list[int] | None = None
) -> geometry.Arrangement:
    named = {str(i): t[None] for i, t in enumerate(tensors)}
    return arrange(named, NOTHING, group, order=order)


def address(plan: geometry.Arrangement, name: str, row: int, n: int) -> int:
    """What `tiles.pointers` computes: the storage element of event element n in a row."""
    layout, start = (
        plan.layouts[name],
        plan.tensors[name].storage_offset() + row * plan.layouts[name].row,
    )
    if layout.kind == UNIT:
        return start + n
    if layout.kind == CONSTANT:
        return start
    outer, within = divmod(n, plan.inner)
    return (
        start + outer * layout.outer + within * (1 if layout.kind == UNIT_PLANE else layout.inner)
    )


MOMENTS = torch.empty(3, 8, 4, 6)
IN_PLACE = {
    "dense": (torch.empty(3, 4, 4, 6), UNIT),
    "row slice": (torch.empty(6, 4, 4, 6)[::2], UNIT),
    "chunk of channels": (MOMENTS.chunk(2, 1)[1], UNIT),
    "channels last": (torch.empty(3, 4, 4, 6).to(memory_format=torch.channels_last), PLANE),
    "chunk of channels last": (MOMENTS.to(memory_format=torch.channels_last).chunk(2, 1)[1], PLANE),
    "chunk of the last dimension": (torch.empty(3, 4, 4, 12).chunk(2, 3)[1], UNIT_PLANE),
    "expanded": (torch.empty(()).expand(3, 4, 4, 6), CONSTANT),
    "expanded over rows": (torch.empty(4, 4, 6).expand(3, 4, 4, 6), UNIT),
    "expanded over events": (torch.empty(3, 1, 1, 1).expand(3, 4, 4, 6), CONSTANT),
    "expanded over pixels": (torch.empty(1, 4, 1, 1).expand(3, 4, 4, 6), PLANE),
    "expanded over channels": (torch.empty(3, 1, 4, 6).expand(3, 4, 4, 6), UNIT_PLANE),
    "rows in reverse order of memory": (torch.empty(4, 4, 6, 3).permute(3, 0, 1, 2), PLANE),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_common_layouts_are_read_in_place(name: str) -> None:
    t, kind = IN_PLACE[name]
    plan = arranged(t, torch.empty(3, 4, 4, 6))
    assert plan.tensors["0"].data_ptr() == t.data_ptr()
    assert plan.layouts["0"].kind == kind
    where = torch.arange(math.prod(t.shape)).reshape(t.shape)
    for row in range(3):
        for n, index in enumerate(where[row].flatten().tolist()):
            place = [int(i) for i in torch.unravel_index(torch.tensor(index), t.shape)]
            expected = t.storage_offset() + sum(i * s for i, s in zip(place, t.stride()))
            assert address(plan, "0", row, n) == expected


def test_three_interleaved_dimensions_are_copied_with_their_values() -> None:
    t = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 5, 4, 3).permute(0, 3, 2, 1)
    plan = arranged(t, torch.empty(2, 3, 4, 5))
    assert torch.equal(plan.tensors["0"][0], t)
    assert plan.layouts["0"].kind == UNIT


def test_an_output_that_cannot_be_written_in_place_is_copied_back() -> None:
    out = torch.zeros(2, 5, 4, 3).permute(0, 3, 2, 1)
    plan = arrange({"in": torch.empty(1, 2, 3, 4, 5), "out": out[None]}, frozenset({"out"}), 4)
    plan.tensors["out"].copy_(torch.arange(120.0).reshape(1, 2, 3, 4, 5))
    plan.finish()
    assert torch.equal(out, torch.arange(120.0).reshape(2, 3, 4, 5))


def test_memory_order_makes_channels_last_one_dense_run() -> None:
    t = torch.empty(3, 4, 5, 6).to(memory_format=torch.channels_last)
    plan = arranged(t, order=geometry.memory_order(t[None]))
    assert plan.layouts["0"].kind == UNIT


def test_samples_and_batch_merge_when_every_tensor_lets_them() -> None:
    dense, shared = torch.empty(5, 3, 8), torch.empty(3, 8).expand(5, 3, 8)
    together = arrange({"a": dense, "b": torch.empty(5, 3, 8)}, NOTHING, 4)
    apart = arrange({"a": dense, "b": shared}, NOTHING, 4)
    assert (together.rows, together.split) == (15, False)
    assert (apart.rows, apart.split, apart.sample_strides) == (15, True, {"a": 24, "b": 0})


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (torch.empty(4, 64), True),
        (torch.empty(4, 65)[:, :64], False),  # rows 260 bytes apart
        (torch.empty(4, 68)[:, 1:65], False),  # begins in the middle of 16 bytes
        (torch.empty(4, 68)[:, 4:68], True),
        (torch.empty(4, 63), False),  # the last group is not whole
        (torch.empty(1, 65)[:, :64], False),  # a row alone is treated as it is in its batch
        (torch.empty(4, 2, 12).chunk(2, 2)[1], False),  # runs of 6
        (torch.empty(4, 2, 16).chunk(2, 2)[1], True),
    ],
)
def test_wide_accesses_are_promised_only_where_they_hold(
    tensor: torch.Tensor, aligned: bool
) -> None:
    assert arranged(tensor).aligned == aligned


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(
    "event",
    [1, 2, 3, 7, 8, 10, 63, 64, 1000, 1023, 1024, 1025, 4096, 4999, 65536, 10**6, 2**31 + 5],
)
def test_every_element_has_a_program(event: int, group: int) -> None:
    plan = divide(event, group)
    latest_start = 0 if event % group == 0 else group - math.gcd(event, group)
    assert plan.splits * plan.iterations * plan.width >= event + latest_start
    assert plan.rows * plan.width == TILE
    assert plan.programs(1000) * plan.rows >= 1000 * plan.splits


def test_the_division_never_sees_the_batch() -> None:
    # Sums have the same bits in every batch because nothing else could change their order.
    assert list(divide.__annotations__) == ["event", "group", "return"]
