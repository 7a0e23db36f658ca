"""CUDA sources as machine code, and that as text. Needs nvcc and cuobjdump (triton's wheel has
one), no GPU."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from build_support.compile import is_newer_than_its_sources
from build_support.nvcc import DEFAULT_ARCHS, Nvcc, arch_flags, find_nvcc

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def _nvcc() -> Nvcc:
    return find_nvcc()


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def cuobjdump_path() -> str:
    """CUDA's disassembler: on PATH, or in triton's wheel."""
    spec = find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        shipped = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        if shipped.exists():
            return str(shipped)
    found = shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError(
            "cuobjdump is neither on PATH nor in an installed triton: pip install triton"
        )
    return found


def dump(binary: Path, arch: str | None = None) -> tuple[str, str]:
    """Resource usage and disassembly; ``arch`` chooses among what an object holds."""
    choice = [] if arch is None else ["--gpu-architecture", f"sm_{arch}"]
    command = [cuobjdump_path(), *choice]
    return (
        run([*command, "--dump-resource-usage", str(binary)]),
        run([*command, "--dump-sass", str(binary)]),
    )


def disassemble(source: Path, arch: str) -> tuple[str, str]:
    """`dump` of a source of csrc/cuda: of the object that the build in this tree has made of it, or
    compiled for the purpose."""
    built = ROOT / "build" / "objects" / f"cuda.{source.stem}.o"
    if _is_current(built) and f".sm_{arch}.cubin" in run(
        [cuobjdump_path(), "--list-elf", str(built)]
    ):
        return dump(built, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        nvcc = str(_nvcc().path)
        run([nvcc, "-std=c++17", "-O3", "-cubin", *_flags(arch), str(source), "-o", str(cubin)])
        return dump(cubin)


def _is_current(built: Path) -> bool:
    try:
        same_nvcc = built.with_suffix(".cmd").read_text().startswith(_nvcc().version_text)
        return same_nvcc and is_newer_than_its_sources(built)
    except OSError:
        return False


def _flags(arch: str) -> list[str]:
    """nvcc's options for one architecture, by way of the PTX that the wheel's code is made of."""
    wheel = " ".join(arch_flags(DEFAULT_ARCHS.split(";")))
    through = re.search(rf"compute_(\d+),code=\[[^]]*sm_{arch}\b", wheel)
    return [f"-arch=compute_{through[1] if through else arch}", f"-code=sm_{arch}"]


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout
