"""Inputs in every layout, and comparisons whose bounds are those of the design."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Relative error of a result before it is rounded to its own dtype. float32: the accuracy that the
# design promises. float64: about 50 roundings, which no formula here exceeds.
RELATIVE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
    torch.float64: 1e-14,
}
# Normals, in units of 1 + |eps|: the contract's figure, and in float64 the rounding of 2 pi u times
# the largest radius.
NORMALS = {torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7, torch.float64: 1e-14}
DTYPES = tuple(RELATIVE)


def nats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Every element differs by at most its bound; expected and bound are float64 on the CPU."""
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().cpu().double(), expected.detach()
    bound = torch.as_tensor(bound, dtype=torch.float64).detach().expand(expected.shape)
    wrong = ~((actual - expected).abs() <= bound)
    if wrong.any():
        at = tuple(i[0].item() for i in wrong.nonzero(as_tuple=True))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are out of bounds, the first at {at}: "
            f"{actual[at].item()!r}, expected {expected[at].item()!r} +- {bound[at].item():.3g}"
        )


def assert_rounded(
    actual: Tensor, expected: Tensor, bound: Tensor | float, truncates: bool = False
) -> None:
    """Every element is a value within its bound, rounded once, to nearest even.

    Rounding is monotonic, so that the two ends of the interval, rounded, enclose every right
    answer. A kernel that truncates, or rounds twice, leaves the interval. ``truncates``: allow the
    next value toward zero (the Triton interpreter's bfloat16 store).
    """
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    low = (expected.detach() - bound).float().to(actual.dtype).double()
    high = (expected.detach() + bound).float().to(actual.dtype).double()
    if truncates:
        ulp = expected.detach().abs() * 2.0**-7
        low, high = (
            torch.where(expected > 0, low - ulp, low),
            torch.where(expected < 0, high + ulp, high),
        )
    actual = actual.detach().cpu().double()
    wrong = ~((low <= actual) & (actual <= high))
    if wrong.any():
        at = tuple(i[0].item() for i in wrong.nonzero(as_tuple=True))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are not rounded right, the first at "
            f"{at}: {actual[at].item()!r}, expected {expected[at].item()!r}, "
            f"so {low[at].item()!r} to {high[at].item()!r}"
        )


def _row_slice(values: Tensor) -> Tensor:
    return torch.cat((values + 1, values), 1)[:, values.shape[1] :]


def _chunk_of_channels_last(values: Tensor) -> Tensor:
    both = torch.cat((values + 1, values), 1).contiguous(memory_format=torch.channels_last)
    return both[:, values.shape[1] :]


def _every_second_row(values: Tensor) -> Tensor:
    return torch.stack((values, values + 1), 1).flatten(0, 1)[::2]


def _misaligned(values: Tensor) -> Tensor:
    flat = values.new_zeros(values.numel() + 1)
    flat[1:] = values.flatten()
    return flat[1:].view(values.shape)


def _odd_strides_of_size_one(values: Tensor) -> Tensor:
    """Strides of dimensions of size 1 mean nothing, and torch leaves any number there."""
    strides = [s if size > 1 else 12345 for size, s in zip(values.shape, values.stride())]
    return torch.as_strided(values, values.shape, strides)


def _sliced_inside(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (1, 2, 2, 1))[..., 2:-1, 1:-2]


def _last_dimension_strided(values: Tensor) -> Tensor:
    return torch.stack((values, values + 1), -1)[..., 0]


# Each takes contiguous values [B, C, H, W] and gives the same values in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "row slice (chunk of the channels)": _row_slice,
    "every second row": _every_second_row,
    "channels_last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "chunk of channels_last": _chunk_of_channels_last,
    "transposed image": lambda values: values.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch innermost": lambda values: values.movedim(0, -1).contiguous().movedim(-1, 0),
    "last dimension strided": _last_dimension_strided,
    "inner slice": _sliced_inside,
    "not aligned": _misaligned,
    "size-1 dimensions with odd strides": _odd_strides_of_size_one,
}
IN_PLACE = (
    "contiguous",
    "row slice (chunk of the channels)",
    "every second row",
    "channels_last",
    "chunk of channels_last",
    "not aligned",
    "size-1 dimensions with odd strides",
)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in a layout; a leaf that requires grad if they do."""
    return LAYOUTS[layout](values.detach()).detach().requires_grad_(values.requires_grad)


def leaf(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device, scale: float = 1.0
) -> Tensor:
    """Normal values that require a gradient; drawn on the CPU, the same for every device."""
    values = torch.randn(shape, dtype=torch.float64) * scale
    return values.to(device=device, dtype=dtype).requires_grad_()
