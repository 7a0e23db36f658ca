"""Compiles the CUDA kernels of csrc/cuda for the CPU, against the header in this folder that
stands in for CUDA's.

``build()`` makes the shared library that registers `torch.ops.fused_elbo_emulated`;
``build_driver()`` the executable of `driver.cpp`, which needs no torch and so runs under the
sanitizers. Both are kept in build/emulation by a hash of all that went in.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulation"

SANITIZERS = {
    "address,undefined": [
        "-fsanitize=address,undefined",
        "-fno-omit-frame-pointer",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-fsanitize=thread", "-DFUSED_ELBO_EMULATED_THREADS"],
}


def build(sanitize: str | None = None) -> Path:
    """The library that registers the emulated operations when it is loaded into torch."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    flags = [
        "-fPIC",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        str(torch / "include"),
    ]
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    sources = [*kernel_sources(ROOT), HERE / "fibers.cpp", ROOT / "csrc" / "torch_ops.cpp"]
    return _compile(ROOT, sources, "libfused_elbo_emulated.so", sanitize, flags, link)


def build_driver(sanitize: str | None = None, root: Path = ROOT, level: str = "") -> Path:
    """The executable that runs the kernels on exactly sized buffers.

    root: a tree whose csrc/ is used instead; level: of optimization, -O0 where compiling is most
    of the work.
    """
    fibers = HERE / ("threads.cpp" if sanitize == "thread" else "fibers.cpp")
    sources = [*kernel_sources(root), fibers, *sorted((HERE / "driver").glob("*.cpp"))]
    return _compile(root, sources, "driver", sanitize, [level] if level else [], [])


def kernel_sources(root: Path) -> list[Path]:
    folder = root / "csrc" / "cuda"
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])


def _compile(
    root: Path,
    sources: Sequence[Path],
    name: str,
    sanitize: str | None,
    flags: Sequence[str],
    link: Sequence[str],
) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [
        *[compiler, "-std=c++17", "-DFUSED_ELBO_EMULATED", "-g1", "-ffp-contract=off"],
        *(["-O1"] if sanitize else ["-O2"]),
        # fma without a call to libm: the kernels are made of it.
        *(["-mavx2", "-mfma"] if os.uname().machine == "x86_64" else []),
        *[f"-I{HERE}", f"-I{root / 'csrc'}"],
        *(SANITIZERS[sanitize] if sanitize else []),
        *flags,
    ]
    folder = CACHE / _digest(root, command, link, compiler)
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        object_file = folder / f"{source.stem}.{os.getpid()}.o"
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(object_file)])
        return object_file

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / f"{name}.{os.getpid()}"
    sanitizer_flags = SANITIZERS[sanitize] if sanitize else []
    _run([compiler, *sanitizer_flags, *map(str, objects), *link, "-lpthread", "-o", str(partial)])
    for object_file in objects:
        object_file.unlink()
    partial.replace(target)  # atomic: several test processes may build at once
    return target


def _digest(root: Path, command: Sequence[str], link: Sequence[str], compiler: str) -> str:
    digest = hashlib.sha256()
    digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    digest.update("\0".join([*command, *link]).encode())
    for folder, patterns in (
        (root / "csrc", ("*.h", "*.cuh", "*.cu", "*.cpp")),
        (HERE, ("*.h", "*.cpp")),
    ):
        for path in sorted(p for pattern in patterns for p in folder.rglob(pattern)):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


if __name__ == "__main__":
    print(build())
