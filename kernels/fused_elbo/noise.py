"""The noise contract: every normal is a pure function of a key and a position.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) turns a
128-bit counter and a 64-bit key into four 32-bit words; Box-Muller turns the words into four
normals. Nothing else enters: not the device, the backend, the grid, the number of threads, nor how
a batch is split.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["NoiseKey"]

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class NoiseKey:
    """Names the noise of one sampling operation.

    The normal at row ``b``, element ``n`` of the event and sample ``k`` depends on ``seed``,
    ``stream``, ``k`` and the global position ``(row_offset + b) * N + n`` alone, so equal keys give
    equal noise on every device and backend.

    Args:
        seed: an int in ``[-2**63, 2**64)``, or a 0-dim int64 tensor on the device of the tensors it
            is used with (a tensor is never read by the host, so CUDA graphs and compiled code may
            change it between runs).
        stream: an int in ``[0, 2**32)``; different streams of one seed are independent.
        row_offset: global index of the first row, so that a shard of a batch draws its rows of the
            whole.

    Raises:
        TypeError: seed, stream or row_offset is not an integer (or the seed tensor is not int64).
        ValueError: a value out of range, or a seed tensor that is not 0-dim.

    Example:
        >>> key = NoiseKey(seed=0).fold_in(step)
        >>> z, kl = reparameterize_kl(mean, logvar, key=key)
        >>> z_hi, _ = reparameterize_kl(mean[32:], logvar[32:], key=key.rows(32))  # equals z[32:]
    """

    seed: int | Tensor
    stream: int = 0
    row_offset: int = 0

    def __post_init__(self) -> None:
        seed = self.seed
        if isinstance(seed, Tensor):
            if seed.dtype != torch.int64:
                raise TypeError(f"NoiseKey: a seed tensor must be int64, got {seed.dtype}")
            if seed.dim() != 0:
                raise ValueError(
                    f"NoiseKey: a seed tensor must be 0-dim, got shape {tuple(seed.shape)}"
                )
        else:
            _check_int("seed", seed, -(1 << 63), 1 << 64)
        _check_int("stream", self.stream, 0, 1 << 32)
        _check_int("row_offset", self.row_offset, 0, 1 << 63)

    def fold_in(self, data: int) -> NoiseKey:
        """An independent key for ``data`` (a layer, a step, a rank): the seed is hashed with it.

        Distinct ``data`` give distinct seeds; the order of several folds matters; stream and
        row_offset are kept.
        """
        data = _check_int("data", data, -(1 << 63), 1 << 64)
        if isinstance(self.seed, Tensor):
            from . import ops

            return replace(self, seed=ops.fold_seed(self.seed, _signed64(data)))
        mixed = _mix((self.seed + _GOLDEN) & _MASK64)
        return replace(self, seed=_signed64(_mix((mixed + data * _GOLDEN) & _MASK64)))

    def rows(self, start: int) -> NoiseKey:
        """The same noise seen from a shard whose first row is row ``start`` of this key's
        tensor."""
        start = _check_int("start", start, 0, 1 << 63)
        return replace(self, row_offset=self.row_offset + start)


def _mix(v: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection of 64-bit
    words."""
    v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & _MASK64
    return v ^ (v >> 31)


def _signed64(v: int) -> int:
    """The int64 with the same 64 bits."""
    return v - (1 << 64) if v >= 1 << 63 else v


def _check_int(name: str, value: object, low: int, high: int) -> int:
    if torch.compiler.is_compiling() and isinstance(value, int):
        return value  # a check of the range would make the graph one for this very number
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"NoiseKey: {name} must be an integer, got {type(value).__name__}"
        ) from None
    if not low <= number < high:
        raise ValueError(f"NoiseKey: {name} must be in [{low}, {high}), got {number}")
    return number
