"""Checks of arguments, before anything runs: every error names the function, the argument, what
came and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise import NoiseKey
from .schemas import REDUCTIONS

FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_DTYPES = "float32, float64, bfloat16 or float16"


def tensor(function: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{function}: {name} must be {_DTYPES}, got {_dtype_name(value.dtype)}")
    return value


def batched(function: str, name: str, value: object) -> Tensor:
    value = tensor(function, name, value)
    if value.dim() == 0:
        raise ValueError(f"{function}: {name} must have a batch dimension, got a 0-dim tensor")
    return value


def like(function: str, name: str, value: object, other_name: str, other: Tensor) -> Tensor:
    """A tensor of the same shape and device as another."""
    value = tensor(function, name, value)
    if value.shape != other.shape:
        raise ValueError(
            f"{function}: {name} must have shape {tuple(other.shape)} like {other_name}, "
            f"got {tuple(value.shape)}"
        )
    same_device(function, name, value, other_name, other)
    return value


def same_device(function: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{function}: {name} must be on {other.device} like {other_name}, "
            f"got a tensor on {value.device}"
        )


def broadcastable(
    function: str, name: str, value: object, other_name: str, other: Tensor
) -> Tensor:
    """A tensor that broadcasts to another's shape without enlarging it."""
    return _fitting(function, name, tensor(function, name, value), other_name, other)


def _fitting(function: str, name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    fits = value.dim() <= other.dim() and all(
        a == b or a == 1 for a, b in zip(reversed(value.shape), reversed(other.shape))
    )
    if not fits:
        raise ValueError(
            f"{function}: {name} must broadcast to the shape {tuple(other.shape)} of {other_name}, "
            f"got {tuple(value.shape)}"
        )
    same_device(function, name, value, other_name, other)
    return value


def mask(function: str, value: object, other_name: str, other: Tensor) -> Tensor:
    """A mask as a view of the shape of another tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: mask must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(
            f"{function}: mask must be a bool tensor, True where an element counts, "
            f"got {_dtype_name(value.dtype)}"
        )
    return _fitting(function, "mask", value, other_name, other).expand(other.shape)


def reduction(function: str, value: object, allowed: tuple[str, ...] = tuple(REDUCTIONS)) -> int:
    if isinstance(value, str) and value in allowed:
        return REDUCTIONS[value]
    hint = ""
    if value == "mean":
        hint = ' ("batchmean" is the mean over the batch of the sum over each event)'
    choices = ", ".join(f'"{name}"' for name in allowed)
    raise ValueError(f"{function}: reduction must be one of {choices}, got {value!r}{hint}")


def number(function: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(
            f"{function}: {name} must be a number or a tensor, got {type(value).__name__}"
        )
    result = float(value)
    # While a graph is traced a number may be symbolic, and has no value to look at.
    if not torch.compiler.is_compiling() and math.isnan(result):
        raise ValueError(f"{function}: {name} must not be NaN")
    return result


def num_samples(function: str, value: object) -> int:
    """None is 0: no sample dimension."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{function}: num_samples must be an integer or None, got {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"{function}: num_samples must be at least 1, got {value}")
    return value  # type: ignore[return-value]


def noise(function: str, key: object, generator: object) -> None:
    if key is not None and not isinstance(key, NoiseKey):
        raise TypeError(
            f"{function}: key must be a fused_elbo.NoiseKey, got {type(key).__name__} "
            "(NoiseKey(seed) makes one)"
        )
    if generator is not None:
        if key is not None:
            raise ValueError(
                f"{function}: give either key or generator, not both: a key already fixes the noise"
            )
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{function}: generator must be a torch.Generator, got {type(generator).__name__}"
            )


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that torch's type promotion gives these tensors."""
    dtype: torch.dtype | None = None
    for t in tensors:
        if t is not None:
            dtype = t.dtype if dtype is None else torch.promote_types(dtype, t.dtype)
    assert dtype is not None
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
