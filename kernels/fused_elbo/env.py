"""`python -m fused_elbo.env`: what is installed, what is built in, what can run and why not.

The output is meant to be pasted into an issue.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

from . import _library, fastpath


def report() -> str:
    """The lines that `python -m fused_elbo.env` prints."""
    sections = {
        "versions": _versions(),
        "extension": _extension(),
        "devices": _devices(),
        "backends": _backends(),
        "environment": _environment(),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<22}{value}" for name, value in rows]
    return "\n".join(lines)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    import torch

    yield "torch", torch.__version__
    # The metadata of the distributions: importing triton to ask it for its version takes seconds.
    for name in ("fused-elbo", "triton", "numpy"):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def _extension() -> Iterator[tuple[str, str]]:
    yield "file", str(_library.EXTENSION)
    failure = _library.reason()
    yield "loads", "yes" if failure is None else f"no: {failure}"
    info = _library.build_info()
    if info is None:
        return
    yield "built for", f"torch >= {info.torch_target}, CPython >= 3.10, Linux {info.machine}"
    yield "built with", f"torch {info.torch}, {info.compiler}, nvcc {info.nvcc or 'none'}"
    in_use = _library.isa_level() if failure is None else "none"
    yield "CPU ISA", f"{in_use} in use, {' '.join(info.isa_levels)} built in"
    slow = fastpath.reason()
    yield "fast path", "yes" if slow is None else f"no: {slow}"
    yield "CUDA archs", " ".join(info.cuda_archs) or f"none: {info.cuda_note}"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cpu", f"{torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "cuda", f"none found by this torch (built for {built or 'CPU only'})"
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        code = f" sm_{major}{minor}, {machine_code(major, minor)}" if torch.version.cuda else ""
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}{code}"


def machine_code(major: int, minor: int) -> str:
    """Which of the architectures built in serves a device of this compute capability."""
    info = _library.build_info()
    archs = info.cuda_archs if info else []
    numbers = [int(arch.removesuffix("+PTX")) for arch in archs]
    same_major = [n for n in numbers if n // 10 == major and n % 10 <= minor]
    if same_major:
        return f"runs the code for {max(same_major)}"
    older = [n for n, arch in zip(numbers, archs) if arch.endswith("+PTX") and n // 10 < major]
    if older:
        return f"runs the PTX for {max(older)}, translated by the driver on first use"
    return "no code built in for it"


def _backends() -> Iterator[tuple[str, str]]:
    from . import backends

    for name, failure in backends.status():
        yield name, "can run" if failure is None else f"cannot run: {failure}"


def _environment() -> Iterator[tuple[str, str]]:
    names = sorted(n for n in os.environ if n.startswith("FUSED_ELBO_") or n == "TRITON_INTERPRET")
    if not names:
        yield "none", "no FUSED_ELBO_* variable is set"
    for name in names:
        yield name, os.environ[name]


if __name__ == "__main__":
    print(report())
