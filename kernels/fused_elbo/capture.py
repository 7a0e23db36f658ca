"""``FUSED_ELBO_CAPTURE=path`` writes down which operations a run calls, to be replayed.

`python -m fused_elbo.profile --capture path` runs them again.

Shapes, strides, dtypes, devices and arguments; never data. One JSON object per line for each
distinct call, appended when it is first seen; at exit the file is written again with the number of
calls of each.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_path = os.environ.get("FUSED_ELBO_CAPTURE") or None
_calls: dict[str, int] = {}
_lock = threading.Lock()


class Call(NamedTuple):
    """One distinct call of a raw operation; tensors in ``args`` are dictionaries (`describe`)."""

    op: str
    backend: str
    args: list[Any]
    calls: int


def is_enabled() -> bool:
    return _path is not None


def record(op: str, backend: str, args: Sequence[Any]) -> None:
    """Counts one call; writes it down if it is the first of its kind."""
    assert _path is not None
    line = json.dumps({"op": op, "backend": backend, "args": [describe(a) for a in args]})
    with _lock:
        if not _calls:
            Path(_path).write_text("")
            atexit.register(_write_counts, Path(_path))
        if line not in _calls:
            with open(_path, "a") as file:
                file.write(line + "\n")
        _calls[line] = _calls.get(line, 0) + 1


def _write_counts(path: Path) -> None:
    lines = (json.dumps({**json.loads(line), "calls": count}) for line, count in _calls.items())
    path.write_text("".join(f"{line}\n" for line in lines))


def load(path: str | Path) -> Iterator[Call]:
    """The calls of a capture file.

    Raises:
        ValueError: naming the line that is not a recorded call.
    """
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            yield Call(entry["op"], entry["backend"], entry["args"], entry.get("calls", 1))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a recorded call: {error!r}") from error


def describe(argument: Any) -> Any:
    """An argument as JSON: a tensor as its shape, strides, dtype and device."""
    if not isinstance(argument, Tensor):
        return argument
    return {
        "shape": list(argument.shape),
        "strides": list(argument.stride()),
        "dtype": str(argument.dtype).removeprefix("torch."),
        "device": argument.device.type,
    }


def rebuild(argument: Any, device: str | None = None) -> Any:
    """The argument of a recorded call, tensors filled with ordinary numbers.

    ``device``: instead of the recorded one.
    """
    if not isinstance(argument, dict):
        return argument
    shape, strides = argument["shape"], argument["strides"]
    dtype: torch.dtype = getattr(torch, argument["dtype"])
    extent = (
        1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        if 0 not in shape
        else 0
    )
    target = device or argument["device"]
    # Half-precision speed depends on the values: neither denormals nor infinities, as in a real
    # run.
    if dtype.is_floating_point:
        storage = torch.randn(extent, device=target).mul_(0.5).to(dtype)
    else:
        storage = torch.randint(0, 1 << 31, (extent,), device=target).to(dtype)
    return storage.as_strided(shape, strides)
