"""Which backend runs, and why.

A choice is made per call: the ``backend=`` argument, then `use_backend`, then the environment
variable ``FUSED_ELBO_BACKEND``, then the device of the tensors. An explicit choice that cannot run
raises; an automatic one falls through to the next candidate and says so once in the log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fastpath, ops
from .ops import Kernels
from .schemas import EXTENSION

__all__ = ["available_backends", "explain", "use_backend"]

_log = logging.getLogger("fused_elbo")


@dataclass
class Backend:
    """A set of kernels: where it runs, why it cannot run here (None: it can), and how to load
    it."""

    name: str
    devices: frozenset[str]
    reason: Callable[[], str | None]
    load: Callable[[], Kernels | None]


def _extension_reason() -> str | None:
    from . import _library

    return _library.reason()


def _cuda_reason() -> str | None:
    from . import _library

    if (reason := _library.reason()) is not None:
        return reason
    if not _library.built_with_cuda():
        return (
            "the extension was built without CUDA kernels (no nvcc was found, or FUSED_ELBO_CUDA=0)"
        )
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend serves AMD devices"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if driver < 13000:
        version = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the NVIDIA driver supports CUDA {version}; 13.0 (driver 580) is needed"
    return None


def _triton_reason() -> str | None:
    from . import triton

    return triton.reason()


def _load_extension() -> Kernels:
    from . import _library

    _library.load()
    fastpath.load()
    return ops.kernels(EXTENSION)


def _load_triton() -> Kernels:
    from .triton import library

    library.register()
    return ops.kernels("fused_elbo_triton")


_TRITON_DEVICES = {"cuda", "cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda"}
_BACKENDS = {
    "cpu": Backend("cpu", frozenset({"cpu"}), _extension_reason, _load_extension),
    "cuda": Backend("cuda", frozenset({"cuda"}), _cuda_reason, _load_extension),
    "triton": Backend("triton", frozenset(_TRITON_DEVICES), _triton_reason, _load_triton),
    "reference": Backend("reference", frozenset(), lambda: None, lambda: None),
}
_CANDIDATES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# What select() answered before, by (device type, requested name); cleared when a choice changes.
_selected: dict[tuple[str, str | None], Kernels | None] = {}
_override: str | None = None
_generation = 0


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run on this machine, else the reason why not."""
    return {name: backend.reason() for name, backend in _BACKENDS.items()}


def status() -> list[tuple[str, str | None]]:
    """`available_backends` as pairs, in order of preference."""
    return list(available_backends().items())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Process-wide, like `torch.backends` flags; a ``backend=`` argument still takes precedence.

    Raises:
        ValueError: no backend has this name.
    """
    global _override
    previous, _override = _override, _known(name)
    _direct_fastpath()
    try:
        yield
    finally:
        _override = previous
        _direct_fastpath()


def select(device_type: str, requested: str | None) -> Kernels | None:
    """The kernels for tensors on a device; None stands for the reference (plain PyTorch).

    Raises:
        ValueError: no backend has the requested name.
        RuntimeError: the requested backend cannot run here, or not on this device.
    """
    choice = (device_type, requested or _override)
    if torch.compiler.is_compiling():
        namespace = _answer_namespace(*choice, _generation)
        return None if namespace is None else ops.TracedKernels(namespace)  # type: ignore[return-value]
    answers = _selected
    try:
        return answers[choice]
    except KeyError:
        pass
    kernels = _answer(*choice)
    answers[choice] = kernels
    _direct_fastpath()
    return kernels


def _answer(device_type: str, requested: str | None) -> Kernels | None:
    from . import instrument

    kernels = _choose(device_type, requested)[1]()
    return instrument.instrument(kernels) if instrument.wanted() else kernels


def _answer_namespace(device_type: str, requested: str | None, generation: int) -> str | None:
    """What a trace needs to know of `_answer`; ``generation`` makes Dynamo ask again when answers
    have changed."""
    kernels = _answer(device_type, requested)
    return None if kernels is None else kernels.namespace


# Looking for libraries cannot be traced. This is torch.compiler.assume_constant_result without its
# import of Dynamo.
_answer_namespace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def renew_selected() -> None:
    """Answer anew what `select` has answered: kernels are to be instrumented, or no longer."""
    global _selected, _generation
    _generation += 1
    # Not changed in place: a thread amid select() must not put an old answer among the new.
    _selected = {choice: _answer(*choice) for choice in list(_selected)}
    _direct_fastpath()


def _direct_fastpath() -> None:
    """Tells the fast path for which devices a call without ``backend=`` runs the extension."""

    def runs_extension(device_type: str) -> bool:
        kernels = _selected.get((device_type, _override))
        return kernels is not None and kernels.namespace == EXTENSION

    fastpath.serve(runs_extension("cpu"), runs_extension("cuda"))


def explain(tensor: Tensor) -> str:
    """One line: which backend would run on this tensor, and why."""
    name, _, why = _choose(tensor.device.type, _override)
    return f"{name}: {why}"


def _choose(
    device_type: str, requested: str | None
) -> tuple[str, Callable[[], Kernels | None], str]:
    source = "requested"
    if (
        requested is None
        and (requested := os.environ.get("FUSED_ELBO_BACKEND") or None) is not None
    ):
        source = "requested by FUSED_ELBO_BACKEND"
    if requested is not None:
        backend = _BACKENDS[_known(requested)]
        if backend.devices and device_type not in backend.devices:
            raise RuntimeError(
                f"fused_elbo: backend {requested!r} ({source}) runs on "
                f"{' and '.join(sorted(backend.devices))} tensors, "
                f"got a {device_type} tensor"
            )
        if (reason := backend.reason()) is not None:
            raise RuntimeError(f"fused_elbo: backend {requested!r} ({source}) cannot run: {reason}")
        return requested, backend.load, source
    reasons: list[str] = []
    for name in _CANDIDATES.get(device_type, ("reference",)):
        if (reason := _BACKENDS[name].reason()) is None:
            why = f"the first that can run on {device_type} tensors"
            if reasons:
                why += f" ({'; '.join(reasons)})"
                _log.warning(
                    "fused_elbo: using the %s backend on %s tensors: %s",
                    name,
                    device_type,
                    "; ".join(reasons),
                )
            return name, _BACKENDS[name].load, why
        reasons.append(f"{name} cannot: {reason}")
    raise AssertionError("the reference backend always runs")


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(
            f"fused_elbo: unknown backend {name!r}, "
            f"expected one of {', '.join(map(repr, _BACKENDS))}"
        )
    return name
