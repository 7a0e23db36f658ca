"""The build of setup.py, on a tiny project with a stand-in for nvcc."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from .conftest import make_toolkit

Build = Callable[..., "subprocess.CompletedProcess[str]"]


def build_info(project: Path) -> dict[str, object]:
    info: dict[str, object] = json.loads(
        (project / "kernels/fused_elbo/_build_info.json").read_text()
    )
    return info


def compiled(output: str) -> set[str]:
    """The objects that a build says it made."""
    return {line.split()[0] for line in output.splitlines() if line.startswith("  ")}


def test_without_nvcc_the_build_is_cpu_only_and_says_so_in_one_line(
    project: Path, build: Build
) -> None:
    done = build()
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if "CUDA" in line]
    assert len(said) == 1
    assert said[0].startswith("fused-elbo: no CUDA kernels: no nvcc in CUDA_HOME")
    info = build_info(project)
    assert info["nvcc"] is None
    assert info["cuda_archs"] == []
    assert "no nvcc" in str(info["cuda_note"])


def test_required_cuda_without_nvcc_is_fatal_in_one_line(project: Path, build: Build) -> None:
    done = build(FUSED_ELBO_CUDA="1")
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: fused-elbo: FUSED_ELBO_CUDA=1, but no nvcc in CUDA_HOME, on PATH or from PyPI"
        " (the extra cuda-build brings one)"
    ]
    assert not list(project.rglob("*.so"))


def test_cuda_can_be_switched_off(project: Path, build: Build, tmp_path: Path) -> None:
    done = build(CUDA_HOME=str(make_toolkit(tmp_path / "cuda")), FUSED_ELBO_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert "FUSED_ELBO_CUDA=0" in str(build_info(project)["cuda_note"])


def test_cuda_kernels_are_linked_and_recorded(project: Path, build: Build, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    toolkit = make_toolkit(tmp_path / "cuda")
    done = build(
        CUDA_HOME=str(toolkit),
        FUSED_ELBO_CUDA="1",
        FUSED_ELBO_FASTPATH="0",  # which would be linked into the same map
        LDFLAGS=f"-Wl,-Map={linked}",
    )
    assert done.returncode == 0, done.stdout
    info = build_info(project)
    assert info["nvcc"] == "13.0.88"
    assert info["cuda_archs"] == ["75", "80", "90+PTX"]  # of the default, what this nvcc knows
    assert "run_kernel" in linked.read_text()  # not of the library, which is stripped


def test_an_nvcc_that_refuses_the_host_compiler_counts_as_none(
    project: Path, build: Build, tmp_path: Path
) -> None:
    toolkit = make_toolkit(tmp_path / "cuda", compile="echo 'error: unsupported GNU'; exit 2")
    done = build(CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stdout
    assert f"no CUDA kernels: {toolkit}/bin/nvcc does not compile: error: unsupp" in done.stdout
    assert "does not compile: error: unsupported GNU" in str(build_info(project)["cuda_note"])

    done = build(CUDA_HOME=str(toolkit), FUSED_ELBO_CUDA="1")
    assert done.returncode != 0
    assert "FUSED_ELBO_CUDA=1, but" in done.stdout


def test_a_mistake_in_a_kernel_is_never_a_cpu_build(
    project: Path, build: Build, tmp_path: Path
) -> None:
    (project / "csrc/cuda/kernel.cu").write_text("void kernel() { forty_two(); }\n")
    done = build(CUDA_HOME=str(make_toolkit(tmp_path / "cuda")))
    assert done.returncode != 0
    assert "forty_two" in done.stdout
    assert not list(project.rglob("*.so"))


def test_kernels_are_compiled_once_per_isa_level_and_the_rest_once(
    project: Path, build: Build
) -> None:
    levels = {"x86_64": {"v2", "v3", "v4"}, "aarch64": {"generic"}}
    output = build().stdout
    machine = str(build_info(project)["machine"])
    assert compiled(output) == {
        "torch.torch_ops.cpu-only.o",
        f"fastpath.{sys.implementation.cache_tag}.o",
        "cpu.dispatch.o",
        *(f"cpu.kernels_twice.{level}.o" for level in levels[machine]),
    }


def test_only_what_changed_is_compiled_again(project: Path, build: Build) -> None:
    assert build().returncode == 0
    assert compiled(build().stdout) == set()

    (project / "csrc/answer.h").write_text("#pragma once\nint answer();\nint other();\n")
    assert compiled(build().stdout) == {"cpu.dispatch.o"}

    changed_flags = build(CXXFLAGS="-DNDEBUG").stdout
    assert {"cpu.dispatch.o", "torch.torch_ops.cpu-only.o"} <= compiled(changed_flags)


def test_a_compile_error_shows_the_compilers_words(project: Path, build: Build) -> None:
    (project / "csrc/cpu/dispatch.cpp").write_text("int answer() { return forty_two; }\n")
    done = build()
    assert done.returncode != 0
    assert "forty_two" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_kernel_that_is_declared_but_not_defined_fails_the_build(
    project: Path, build: Build
) -> None:
    (project / "csrc/torch_ops.cpp").write_text("void latent(); void call() { latent(); }\n")
    done = build()
    assert done.returncode != 0
    assert "latent" in done.stdout


def test_building_does_not_import_torch(project: Path, without_nvcc: dict[str, str]) -> None:
    script = (
        "import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext'];"
        "runpy.run_path('setup.py', run_name='__main__'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=project, env=without_nvcc, check=True)
    assert list(project.glob("build/lib*/fused_elbo/_C.abi3.so"))


def fastpath_module(project: Path) -> list[Path]:
    return list((project / "kernels/fused_elbo").glob("_fastpath*.so"))


def test_the_fast_path_is_built_beside_the_extension_and_recorded(
    project: Path, build: Build
) -> None:
    assert build().returncode == 0
    (module,) = fastpath_module(project)
    assert module.name == f"_fastpath{sysconfig.get_config_var('EXT_SUFFIX')}"
    info = build_info(project)
    assert info["fastpath"] == f"{torch.__version__} {torch.version.git_version}"
    assert info["fastpath_note"] is None


def test_a_fast_path_that_does_not_compile_costs_nothing_but_speed(
    project: Path, build: Build
) -> None:
    assert build().returncode == 0
    (project / "csrc/fastpath/module.cpp").write_text("int answer() { return forty_two; }\n")
    done = build()
    assert done.returncode == 0
    assert "forty_two" in done.stdout
    assert "no fast path: it does not compile against torch" in done.stdout
    assert fastpath_module(project) == []  # nor an older one
    info = build_info(project)
    assert info["fastpath"] is None
    assert torch.__version__ in str(info["fastpath_note"])

    fatal = build(FUSED_ELBO_FASTPATH="1")
    assert fatal.returncode != 0
    assert "forty_two" in fatal.stdout
    assert "Traceback" not in fatal.stdout


def test_the_fast_path_can_be_left_out(project: Path, build: Build) -> None:
    assert build(FUSED_ELBO_FASTPATH="0").returncode == 0
    assert fastpath_module(project) == []
    assert build_info(project)["fastpath_note"] == "FUSED_ELBO_FASTPATH=0 when this was built"
    wrong = build(FUSED_ELBO_FASTPATH="yes")
    assert wrong.returncode != 0
    assert "error: fused-elbo: FUSED_ELBO_FASTPATH must be 0 or 1, got 'yes'" in wrong.stdout


def test_without_pythons_headers_there_is_no_fast_path(
    project: Path, build: Build, tmp_path: Path
) -> None:
    (project / "sitecustomize.py").write_text(
        "import sysconfig\n"
        "get_path = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *a, **k: '/nowhere' if name == 'include'"
        " else get_path(name, *a, **k)\n"
    )
    done = build(PYTHONPATH=f"{project}:{tmp_path / 'hidden'}")
    assert done.returncode == 0
    assert "no fast path: /nowhere/Python.h is missing" in done.stdout
    assert "python3-dev" in str(build_info(project)["fastpath_note"])
