"""Finding nvcc, and what to tell it.

nvcc comes from CUDA_HOME, from PATH, or from NVIDIA's PyPI packages (the `cuda-build` extra), which
put a whole toolkit under site-packages/nvidia/cu13, so that a machine without a CUDA installation
builds the same wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "75;80;86;89;90;100;120+PTX"


class NvccError(Exception):
    """No usable nvcc; the message is one line that says why and what would help."""


@dataclass(frozen=True)
class Nvcc:
    path: Path
    root: Path  # of the toolkit, which a wrapper script's own folder does not tell
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def library_dir(self) -> Path:
        """The folder of libcudart_static.a.

        Raises:
            NvccError: the toolkit has no static CUDA runtime.
        """
        places = [*sorted(self.root.glob("targets/*/lib")), self.root / "lib64", self.root / "lib"]
        for place in places:
            if (place / "libcudart_static.a").is_file():
                return place
        raise NvccError(
            f"no libcudart_static.a under {self.root}; the PyPI package is nvidia-cuda-runtime"
        )

    def supported_archs(self) -> set[int]:
        listed = _output([str(self.path), "--list-gpu-code"])
        return {int(number) for number in re.findall(r"sm_(\d+)\b", listed)}

    def compression_flags(self) -> list[str]:
        # Older drivers do not know the size mode's zstd; every driver that runs CUDA 13 code does.
        return (
            ["--compress-mode=size"] if self.version >= (13, 0, 0) else ["-Xfatbin=-compress-all"]
        )


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Nvcc:
    """The first nvcc of CUDA_HOME, PATH and the PyPI packages.

    Raises:
        NvccError: there is none, or the one found does not run.
    """
    for candidate in _candidates(environ):
        return Nvcc(candidate, _toolkit_root(candidate), _version(candidate))
    raise NvccError("no nvcc in CUDA_HOME, on PATH or from PyPI (the extra cuda-build brings one)")


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    if home := environ.get("CUDA_HOME"):
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.is_file():
            raise NvccError(f"CUDA_HOME={home} holds no bin/nvcc")
        yield nvcc
    if on_path := shutil.which("nvcc", path=environ.get("PATH", "")):
        yield Path(on_path)
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(location).glob("cu[0-9]*/bin/nvcc"), reverse=True)


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NvccError(f"{' '.join(command)} failed: {detail[-1] if detail else error}") from error
    return done.stdout + done.stderr


def _toolkit_root(nvcc: Path) -> Path:
    # nvcc prints the variables of nvcc.profile before the commands that it would run.
    found = re.search(
        r"^#\$ TOP=(.+)$", _output([str(nvcc), "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE
    )
    if found is None:
        raise NvccError(f"{nvcc} --dryrun does not say where its toolkit is")
    return Path(found.group(1).strip()).resolve()


def _version(nvcc: Path) -> tuple[int, int, int]:
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", _output([str(nvcc), "--version"]))
    if found is None:
        raise NvccError(f"{nvcc} --version names no version")
    major, minor, patch = map(int, found.groups())
    return major, minor, patch


def choose_archs(requested: str | None, supported: set[int]) -> list[str]:
    """The architectures to compile for: `90`, or `120+PTX` with code that newer devices translate.

    A list that the user asked for is taken whole. Of the default list, what this nvcc does not know
    is left out, and the newest one left carries the PTX.

    Raises:
        NvccError: an entry is not of these forms, or nothing is left.
    """
    entries = [entry.strip() for entry in (requested or DEFAULT_ARCHS).split(";") if entry.strip()]
    for entry in entries:
        if not re.fullmatch(r"\d+[af]?(\+PTX)?", entry):
            raise NvccError(
                "FUSED_ELBO_CUDA_ARCHS: expected entries like 90 or 120+PTX with ';' between them,"
                f" got {entry!r}"
            )
    if not requested:
        entries = [entry for entry in entries if int(entry.removesuffix("+PTX")) in supported]
        if entries and not entries[-1].endswith("+PTX"):
            entries[-1] += "+PTX"
    if not entries:
        raise NvccError(
            f"this nvcc supports none of the architectures {requested or DEFAULT_ARCHS}"
        )
    return entries


def arch_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's options for these architectures.

    Those from 80 to 90 are assembled from one PTX, which saves a third of the compile time. The
    kernels use nothing that compute_80 lacks, and the machine code is the same either way.
    """
    codes: dict[str, list[str]] = {}
    oldest_shared = ""
    for entry in archs:
        number = entry.removesuffix("+PTX")
        if entry.isdecimal() and 80 <= int(entry) <= 90:
            oldest_shared = oldest_shared or number
            codes.setdefault(oldest_shared, []).append(f"sm_{number}")
        else:
            ptx = [f"compute_{number}"] if entry.endswith("+PTX") else []
            codes.setdefault(number, []).extend([f"sm_{number}", *ptx])
    return [
        f"--generate-code=arch=compute_{virtual},code=[{','.join(real)}]"
        for virtual, real in codes.items()
    ]
