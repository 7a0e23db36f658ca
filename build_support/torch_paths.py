"""Where the installed torch keeps its headers and libraries, found without importing it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import PlatformError

# The oldest torch whose stable ABI has everything that csrc/torch_ops.cpp uses. An extension built
# for a newer target does not load on it.
TARGET = (2, 10)
TARGET_TEXT = ".".join(map(str, TARGET))
TARGET_MACRO = f"0x{TARGET[0]:02x}{TARGET[1]:02x}" + "0" * 12


@dataclass(frozen=True)
class TorchPaths:
    version: str
    git_version: str
    include: Path
    lib: Path


def find_torch() -> TorchPaths:
    """The torch to compile against.

    Raises:
        PlatformError: torch is missing, older than TARGET, or came without its C++ headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise PlatformError(
            f"fused-elbo: building needs torch >= {TARGET_TEXT}; pip install it, then build again"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    version = _read(root / "version.py", "__version__")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < TARGET:
        raise PlatformError(
            f"fused-elbo: building needs torch >= {TARGET_TEXT}, found {version} in {root}"
        )
    if not (root / "include/torch/csrc/stable").is_dir():
        raise PlatformError(
            f"fused-elbo: the torch in {root} has no C++ headers; reinstall it from a wheel"
        )
    git_version = _read(root / "version.py", "git_version")
    return TorchPaths(version, git_version, root / "include", root / "lib")


def _read(file: Path, name: str) -> str:
    """The value of a string that a module assigns."""
    found = re.search(
        rf"^{name}(?:\s*:[^=]*)?\s*=\s*['\"]([^'\"]+)['\"]", file.read_text(), re.MULTILINE
    )
    if found is None:
        raise PlatformError(f"fused-elbo: cannot read {name} of torch from {file}")
    return found.group(1)
