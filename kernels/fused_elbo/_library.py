"""The compiled extension: loaded on first use, and what is known of it without loading it."""

from __future__ import annotations

import ctypes
import functools
import json
from dataclasses import dataclass
from pathlib import Path

EXTENSION = Path(__file__).with_name("_C.abi3.so")
_BUILD_INFO = Path(__file__).with_name("_build_info.json")


@dataclass(frozen=True)
class BuildInfo:
    """What setup.py recorded beside the extension.

    torch: the version compiled against; torch_target: the oldest that the result loads on.
    cuda_archs: compute capabilities times ten, with "+PTX" also code that newer devices translate.
    cuda_note: why there are no CUDA kernels.
    fastpath: the version and commit of the torch that _fastpath was compiled against, or None;
        fastpath_note: why it was not.
    """

    version: str
    machine: str
    compiler: str
    isa_levels: list[str]
    torch: str
    torch_target: str
    nvcc: str | None
    cuda_archs: list[str]
    cuda_note: str | None
    fastpath: str | None
    fastpath_note: str | None


@functools.cache
def build_info() -> BuildInfo | None:
    """The record of the build, or None where the package lies unbuilt. Needs no torch."""
    if not _BUILD_INFO.is_file():
        return None
    return BuildInfo(**json.loads(_BUILD_INFO.read_text()))


def built_with_cuda() -> bool:
    """Whether the extension holds CUDA kernels (not whether a device is here to run them)."""
    info = build_info()
    return info is not None and bool(info.cuda_archs)


def load() -> None:
    """Registers the operators of `torch.ops.fused_elbo`, once.

    Raises:
        ImportError: the extension is missing or does not load; the same message on every call.
    """
    failure = reason()
    if failure is not None:
        raise ImportError(failure)


@functools.cache
def reason() -> str | None:
    """Why the extension cannot be used, or None if it can. Loads it on the first call."""
    info = build_info()
    if info is None or not EXTENSION.is_file():
        return (
            f"fused_elbo: {EXTENSION.name} is missing from {EXTENSION.parent}: the package was not"
            " built. Install it with pip, or run `make build` in the source tree."
        )
    import torch  # Before the extension, which takes torch's libraries as loaded.

    if _release(torch.__version__) < _release(info.torch_target):
        return (
            f"fused_elbo: needs torch >= {info.torch_target}, found {torch.__version__}."
            " Upgrade torch; the extension need not be rebuilt."
        )
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return (
            f"fused_elbo: {EXTENSION} (built against torch {info.torch}) does not load into"
            f" torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def isa_level() -> str:
    """The instruction set that the CPU kernels run with: v2, v3 or v4 of x86-64, or generic.

    FUSED_ELBO_ISA, read when the extension is loaded, forces a lower one.

    Raises:
        ImportError: the extension does not load.
    """
    load()
    function = ctypes.CDLL(str(EXTENSION)).fused_elbo_isa_level
    function.restype = ctypes.c_char_p
    return bytes(function()).decode()
