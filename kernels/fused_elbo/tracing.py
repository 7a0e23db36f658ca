"""Named ranges around every operation, for Nsight Systems, Nsight Compute and torch.profiler.

On with the environment variable ``FUSED_ELBO_NVTX=1`` (read at import) or `enable`. Each raw
operation then runs in one range, ``latent_forward cpu float32 [64, 128]`` (operation, backend,
dtype, shape; the payload is the number of elements), in the NVTX domain ``fused_elbo`` and, while
torch.profiler records, as a ``record_function``.

Off, nothing is imported and nothing is spent: `backends.select` hands out the kernels themselves.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch

__all__ = ["disable", "enable", "is_enabled", "range"]

DOMAIN = "fused_elbo"
_COLORS = {"forward": 0xFF76B900, "backward": 0xFF1F77B4}

_log = logging.getLogger("fused_elbo")
_enabled = os.environ.get("FUSED_ELBO_NVTX", "0") not in ("", "0")


class _Restore(AbstractContextManager[None]):
    """What `enable` returns: leaving it puts back what was before."""

    def __init__(self, previous: bool) -> None:
        self._previous = previous

    def __exit__(self, *_: object) -> None:
        _set(self._previous)


def enable() -> AbstractContextManager[None]:
    """Switch the ranges on, for the whole process; as a context manager, until its end.

    NVTX ranges need the PyPI package ``nvtx``. Without it the ranges are seen by torch.profiler
    alone, and the log says so once. Compiled functions are compiled again, once, when the ranges
    are switched on or off.

    Example:
        >>> with fused_elbo.tracing.enable():
        ...     train_step()
    """
    previous = _enabled
    _set(True)
    return _Restore(previous)


def disable() -> None:
    """Switch the ranges off again."""
    _set(False)


def is_enabled() -> bool:
    """Whether operations run inside ranges."""
    return _enabled


def _set(value: bool) -> None:
    global _enabled
    _enabled = value
    from . import backends

    backends.renew_selected()


def range(name: str) -> AbstractContextManager[object]:
    """A range of your own, in the same domain: the encoder, the optimizer, one epoch.

    Recorded while tracing is on or torch.profiler records; otherwise, and inside torch.compile, it
    does nothing.
    """
    if _is_dynamo_compiling():
        return nullcontext()  # the one context manager without effect that Dynamo knows
    return Range(name) if _enabled or _profiler_enabled() else _NOTHING


_NOTHING = nullcontext()
_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_is_dynamo_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling


class Range(AbstractContextManager[None]):
    """Pushes on entry, pops on exit, on the thread that runs it, whatever is raised between."""

    __slots__ = ("_domain", "_message", "_payload", "_record")

    def __init__(self, message: str, payload: int | None = None) -> None:
        self._message, self._payload = message, payload
        # Kept for the exit: what has been pushed must be popped even if tracing is switched off
        # meanwhile.
        self._domain = domain() if _enabled else None
        self._record: Any = None

    def __enter__(self) -> None:
        if self._domain is not None:
            self._domain.push_range(_attributes(self._message, self._payload))
        if _profiler_enabled():
            self._record = torch.profiler.record_function(f"{DOMAIN}: {self._message}")
            self._record.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._record is not None:
                self._record.__exit__(kind, error, trace)
        finally:
            if self._domain is not None:
                self._domain.pop_range()


@functools.cache
def domain() -> Any:
    """The NVTX domain, None where the nvtx package is missing. Imports it on the first call."""
    try:
        import nvtx  # type: ignore[import-untyped]
    except ImportError:
        _log.warning(
            "fused_elbo: tracing is on, but the Python package nvtx is missing: only "
            "torch.profiler sees the ranges. Install it with `pip install nvtx`."
        )
        return None
    created = nvtx.get_domain(DOMAIN)
    return created if hasattr(created, "push_range") else _EarlyDomain(nvtx)


class _EarlyDomain:
    """The methods that nvtx's Domain has since 0.2.12, by what there was before.

    Those are the versions that Nsight Systems 2022.4 can see.
    """

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx

    def get_event_attributes(self, **attributes: Any) -> dict[str, Any]:
        return attributes

    def push_range(self, attributes: dict[str, Any]) -> None:
        self._nvtx.push_range(**attributes, domain=DOMAIN)

    def pop_range(self) -> None:
        self._nvtx.pop_range(domain=DOMAIN)


@functools.lru_cache(maxsize=4096)
def _attributes(message: str, payload: int | None) -> Any:
    """What a tool is told of a range; kept, because tools keep every registered string anyway."""
    name = message.split(" ", 1)[0]
    color = _COLORS.get(name.rpartition("_")[2], 0xFFBBBBBB)
    return domain().get_event_attributes(message=message, color=color, payload=payload)
