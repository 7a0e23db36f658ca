"""Loading the extension: late, once, and with the whole reason when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fused_elbo
from fused_elbo import _library, fastpath


@pytest.fixture(autouse=True)
def forget_what_was_loaded() -> Iterator[None]:
    _library.reason.cache_clear()
    yield
    _library.reason.cache_clear()


def run(script: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_initializes_no_device_and_loads_neither_triton_nor_the_extension() -> None:
    run(
        "import sys, torch\n"
        "def refuse(*args, **kwargs): raise AssertionError('a device was initialized')\n"
        "torch.cuda._lazy_init = refuse\n"
        "import fused_elbo\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert '_C.abi3.so' not in open('/proc/self/maps').read()\n"
        "from fused_elbo import _library\n"
        "_library.load()\n"
        "assert '_C.abi3.so' in open('/proc/self/maps').read()\n"
    )


def test_the_version_is_that_of_the_distribution() -> None:
    assert fused_elbo.__version__ == metadata.version("fused-elbo")


def test_a_missing_extension_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_library, "EXTENSION", tmp_path / "_C.abi3.so")
    with pytest.raises(ImportError, match=r"was not built.*pip.*make build"):
        _library.load()


def test_a_failure_is_reported_whole_every_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(bytes(4096))
    monkeypatch.setattr(_library, "EXTENSION", broken)
    for _ in range(2):
        with pytest.raises(ImportError, match=r"_C\.abi3\.so.*does not load.*invalid ELF header"):
            _library.load()
    assert torch.__version__ in str(_library.reason())


def test_a_torch_older_than_the_stable_abi_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert _library.reason() == (
        "fused_elbo: needs torch >= 2.10, found 2.9.1+cu128."
        " Upgrade torch; the extension need not be rebuilt."
    )


def test_torch_2_10_counts_as_newer_than_2_9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert _library.reason() is None


def test_the_isa_level_is_one_that_was_built_and_can_be_lowered() -> None:
    info = _library.build_info()
    assert info is not None
    ask = "from fused_elbo import _library; print(_library.isa_level())"
    assert run(ask, FUSED_ELBO_ISA="").strip() in info.isa_levels
    assert run(ask, FUSED_ELBO_ISA=info.isa_levels[0]).strip() == info.isa_levels[0]


def test_cuda_kernels_count_as_built_in_when_an_architecture_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = _library.build_info()
    assert info is not None
    for archs in ([], ["90"]):
        monkeypatch.setattr(_library, "build_info", lambda a=archs: replace(info, cuda_archs=a))
        assert _library.built_with_cuda() is bool(archs)


def dynamic_section() -> str:
    return subprocess.run(
        ["readelf", "-W", "-d", str(_library.EXTENSION)], capture_output=True, text=True, check=True
    ).stdout


def symbols(*options: str) -> set[tuple[str, str]]:
    """(kind, name) of the extension's dynamic symbols, as nm tells them."""
    listing = subprocess.run(
        ["nm", "-D", *options, str(_library.EXTENSION)], capture_output=True, text=True, check=True
    ).stdout
    return {(line.split()[-2], line.split()[-1].split("@")[0]) for line in listing.splitlines()}


def test_the_extension_needs_torch_but_no_cuda_library() -> None:
    needed = dynamic_section()
    # libtorch.so brings libtorch_cuda where there is one; without it the stream is never found.
    assert "[libtorch.so]" in needed
    assert "[libtorch_cpu.so]" in needed
    assert "cuda" not in needed
    assert "python" not in needed


def test_the_extension_exports_nothing_that_could_meet_another_library() -> None:
    assert symbols("--defined-only") == {
        ("T", "fused_elbo_isa_level"),
        ("D", "fused_elbo_direct_operations"),
    }


def test_the_cuda_stream_is_a_weak_reference() -> None:
    if not _library.built_with_cuda():
        pytest.skip("this build has no CUDA kernels")
    assert ("w", "aoti_torch_get_current_cuda_stream") in symbols("--undefined-only")


def fastpath_reason(monkeypatch: pytest.MonkeyPatch, **changes: object) -> str | None:
    """What `fastpath.reason` would say had the build recorded something else."""
    info = _library.build_info()
    assert info is not None
    monkeypatch.setattr(_library, "build_info", lambda: replace(info, **changes))  # type: ignore[arg-type]
    return fastpath.reason.__wrapped__()


def test_the_fast_path_is_used_with_the_torch_it_was_compiled_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FUSED_ELBO_FASTPATH", raising=False)
    assert fastpath_reason(monkeypatch) is None
    older = "2.10.0 449b1768410104d3ed79d3bcfe4ba1d65c7f22c0"
    reason = fastpath_reason(monkeypatch, fastpath=older)
    assert reason == (
        f"compiled against torch {older}, "
        f"and this is torch {torch.__version__} {torch.version.git_version}"
    )
    same_version = f"{torch.__version__} {'0' * 40}"
    assert same_version in str(fastpath_reason(monkeypatch, fastpath=same_version))
    why = "it does not compile against torch 2.99"
    assert fastpath_reason(monkeypatch, fastpath=None, fastpath_note=why) == why


def test_the_fast_path_can_be_switched_off_and_results_stay() -> None:
    ask = (
        "import torch; from fused_elbo import reparameterize_kl, NoiseKey;"
        "m = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_();"
        "z, kl = reparameterize_kl(m, m, key=NoiseKey(1));"
        "(z.sum() + kl.sum()).backward(); print(z.grad_fn.name(), m.grad.tolist())"
    )
    fast = run(ask, FUSED_ELBO_FASTPATH="").split(maxsplit=1)
    slow = run(ask, FUSED_ELBO_FASTPATH="0").split(maxsplit=1)
    assert fast[0] == "LatentBackward"
    assert slow[0] == "_LatentBackward"
    assert fast[1] == slow[1]


def test_a_fast_path_for_another_python_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fused_elbo._fastpath", None)
    assert "does not load into this Python" in str(fastpath.reason.__wrapped__())
