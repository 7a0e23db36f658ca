"""A tiny project around the build code of this one: what a build does, seen in a second."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

SOURCES = {
    "csrc/answer.h": "#pragma once\nint answer();\n",
    "csrc/torch_ops.cpp": """
        #ifdef FUSED_ELBO_WITH_CUDA
        extern "C" void kernel();
        extern "C" __attribute__((visibility("default"))) void run_kernel() { kernel(); }
        #endif
        """,
    "csrc/cpu/dispatch.cpp": '#include "answer.h"\nint answer() { return 42; }\n',
    "csrc/cpu/kernels_twice.cpp": """
        namespace FUSED_ELBO_ISA {
        void twice(float* x, int n) { for (int i = 0; i < n; ++i) x[i] *= 2; }
        }
        """,
    "csrc/cuda/kernel.cu": 'void launch(); extern "C" void kernel() { launch(); }\n',
    "csrc/cuda/host.cpp": "void launch() {}\n",
    "csrc/fastpath/module.cpp": """
        extern "C" __attribute__((visibility("default"))) void* PyInit__fastpath() { return 0; }
        """,
    "README.md": "",
    "LICENSE": "",
}

# As much of nvcc as the build asks for: where it lives, what it knows, and a compiler.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ TOP={root}/bin/..' >&2 ;;
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  *--list-gpu-code*) printf 'sm_75\\nsm_80\\nsm_90\\n' ;;
  *) {compile} ;;
esac
"""
# Turns "... -MMD -MF a.d -c kernel.cu -o a.o" into a call of g++.
COMPILE = (
    "while [ $1 != -MMD ]; do shift; done;"
    " exec g++ -fPIC -D__global__= -MMD -MF $3 -c -x c++ $5 -o $7"
)


def make_toolkit(root: Path, compile: str = COMPILE) -> Path:
    """A folder that looks like a CUDA toolkit to the build."""
    (root / "bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    nvcc = root / "bin/nvcc"
    nvcc.write_text(FAKE_NVCC.format(root=root, compile=compile))
    nvcc.chmod(0o755)
    subprocess.run(["ar", "rc", str(root / "lib64/libcudart_static.a")], check=True)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The root of the tiny project."""
    root = tmp_path / "project"
    for name, text in SOURCES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    shutil.copytree(REPOSITORY / "build_support", root / "build_support")
    for package in (
        "kernels/fused_elbo/integrations",
        "kernels/fused_elbo/triton",
        "vae/fused_vae",
    ):
        (root / package).mkdir(parents=True)
    return root


@pytest.fixture
def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment in which no nvcc of this machine can be found, but the C++ compiler can."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_ELBO_", "CUDA"))}
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("g++", "as", "ld"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    # A package of that name hides the namespace package that NVIDIA's distributions share.
    hidden = tmp_path / "hidden" / "nvidia" / "__init__.py"
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    return environ | {"PATH": str(tools), "PYTHONPATH": str(hidden.parents[1])}


@pytest.fixture
def build(
    project: Path, without_nvcc: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Builds the tiny project in place; environment variables by keyword."""

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=project,
            env=without_nvcc | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run
