"""Which nvcc is found, and which architectures it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_support.nvcc import NvccError, arch_flags, choose_archs, find_nvcc

from .conftest import make_toolkit


@pytest.fixture
def pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NVIDIA's packages as pip lays them out, at the front of sys.path; empty at first."""
    site = tmp_path / "site"
    (site / "nvidia").mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(site)])
    return site / "nvidia" / "cu13"


def test_cuda_home_precedes_path_and_path_precedes_pypi(tmp_path: Path, pypi: Path) -> None:
    home, path = make_toolkit(tmp_path / "home"), make_toolkit(tmp_path / "path")
    make_toolkit(pypi)
    environ = {"CUDA_HOME": str(home), "PATH": f"{path}/bin:/usr/bin:/bin"}
    assert find_nvcc(environ).root == home
    del environ["CUDA_HOME"]
    assert find_nvcc(environ).root == path
    environ["PATH"] = "/nonexistent"
    assert find_nvcc(environ).root == pypi


def test_a_wrapper_script_is_asked_for_its_toolkit(tmp_path: Path, pypi: Path) -> None:
    toolkit = make_toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    nvcc = find_nvcc({"PATH": f"{wrapper.parent}:/usr/bin:/bin"})
    assert nvcc.path == wrapper
    assert nvcc.root == toolkit
    assert nvcc.library_dir() == toolkit / "lib64"
    assert nvcc.version == (13, 0, 88)


def test_no_nvcc_anywhere_is_said(pypi: Path) -> None:
    with pytest.raises(NvccError, match="no nvcc in CUDA_HOME, on PATH or from PyPI"):
        find_nvcc({"PATH": "/nonexistent"})


def test_a_cuda_home_without_nvcc_is_an_error_not_a_reason_to_look_elsewhere(
    tmp_path: Path, pypi: Path
) -> None:
    other = make_toolkit(tmp_path / "other")
    with pytest.raises(NvccError, match="holds no bin/nvcc"):
        find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": f"{other}/bin"})


def test_an_nvcc_that_does_not_run_is_reported_with_its_last_words(
    tmp_path: Path, pypi: Path
) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'libfoo.so: cannot open' >&2\nexit 127\n")
    nvcc.chmod(0o755)
    with pytest.raises(NvccError, match=r"libfoo\.so: cannot open"):
        find_nvcc({"PATH": str(nvcc.parent)})


def test_a_toolkit_without_the_static_runtime_names_the_package(tmp_path: Path, pypi: Path) -> None:
    toolkit = make_toolkit(tmp_path / "toolkit")
    (toolkit / "lib64/libcudart_static.a").unlink()
    with pytest.raises(NvccError, match="nvidia-cuda-runtime"):
        find_nvcc({"CUDA_HOME": str(toolkit)}).library_dir()


def test_the_default_architectures_shrink_to_what_nvcc_knows_and_keep_ptx() -> None:
    assert choose_archs(None, {75, 80, 86, 89, 90}) == ["75", "80", "86", "89", "90+PTX"]
    everything = choose_archs(None, {75, 80, 86, 89, 90, 100, 103, 120, 121})
    assert everything == ["75", "80", "86", "89", "90", "100", "120+PTX"]


def test_requested_architectures_are_taken_whole() -> None:
    assert choose_archs("80; 90a", {80}) == ["80", "90a"]


@pytest.mark.parametrize("text", ["sm_90", "9.0", "90,100", "90+ptx"])
def test_architectures_in_another_notation_are_refused(text: str) -> None:
    with pytest.raises(NvccError, match="expected entries like 90 or 120"):
        choose_archs(text, {90})


def test_ptx_is_made_only_where_asked_for() -> None:
    assert arch_flags(["75", "100", "120+PTX"]) == [
        "--generate-code=arch=compute_75,code=[sm_75]",
        "--generate-code=arch=compute_100,code=[sm_100]",
        "--generate-code=arch=compute_120,code=[sm_120,compute_120]",
    ]


def test_architectures_from_80_to_90_share_the_ptx_of_the_oldest() -> None:
    assert arch_flags(["75", "86", "89", "90"]) == [
        "--generate-code=arch=compute_75,code=[sm_75]",
        "--generate-code=arch=compute_86,code=[sm_86,sm_89,sm_90]",
    ]
    # PTX for 90, and code with features of 90 alone, cannot come from an older one.
    assert arch_flags(["80", "90+PTX"])[1].endswith("compute_90,code=[sm_90,compute_90]")
    assert arch_flags(["80", "90a"])[1].endswith("compute_90a,code=[sm_90a]")
