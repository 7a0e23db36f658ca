"""Which backends this run tests, and why it leaves the others out: see the pytest header.

``--backends=cpu,cuda`` or ``FUSED_ELBO_TEST_BACKENDS=cpu,cuda`` chooses. By default: all of them
where there is a GPU, cuda and triton on it. Without one: reference, cpu and cuda, where cuda is the
same CUDA source compiled for the CPU (tests/emulation); triton runs on its interpreter, which needs
a process of its own: ``FUSED_ELBO_TEST_BACKENDS=triton``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

KNOWN = ("reference", "cpu", "cuda", "triton")
DEFAULT = ("reference", "cpu", "cuda")
EMULATED_NAMESPACE = "fused_elbo_emulated"

_running = pytest.StashKey[dict[str, str]]()  # backend -> how it runs
_left_out = pytest.StashKey[dict[str, str]]()  # backend -> why it does not


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default=os.environ.get("FUSED_ELBO_TEST_BACKENDS", ""),
        help=f"backends to test, of {','.join(KNOWN)}; default: {','.join(DEFAULT)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernels: a claim about kernels, not made of the plain-PyTorch reference"
    )
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one worker per core
    chosen = tuple(
        filter(None, (name.strip() for name in config.getoption("--backends").split(",")))
    )
    if unknown := set(chosen) - set(KNOWN):
        raise pytest.UsageError(
            f"--backends: unknown {', '.join(sorted(unknown))}, expected {', '.join(KNOWN)}"
        )
    if "triton" in chosen and not torch.cuda.is_available():
        if {"triton.runtime", "fused_elbo"} & sys.modules.keys():
            raise pytest.UsageError(
                "--backends=triton: set TRITON_INTERPRET=1 before Python starts"
            )
        os.environ["TRITON_INTERPRET"] = "1"

    default = KNOWN if torch.cuda.is_available() else DEFAULT
    running: dict[str, str] = {}
    left_out = {
        name: "not among the chosen backends" for name in KNOWN if name not in (chosen or default)
    }
    for name in chosen or default:
        how, reason = _prepare(name)
        if reason is None:
            running[name] = how
        elif chosen or name == "cpu":
            raise pytest.UsageError(f"the {name} backend was to be tested and cannot run: {reason}")
        else:
            left_out[name] = reason
    if not chosen and not torch.cuda.is_available():
        left_out["triton"] = (
            "its interpreter needs a process of its own: FUSED_ELBO_TEST_BACKENDS=triton"
        )
    config.stash[_running], config.stash[_left_out] = running, left_out


def _prepare(name: str) -> tuple[str, str | None]:
    """How a backend runs in this process, and why it cannot (None: it can)."""
    from fused_elbo.backends import _BACKENDS

    if name == "cuda" and not torch.cuda.is_available():
        try:
            _emulate_cuda()
        except Exception as error:
            return "", f"no CUDA device, and the emulation does not build: {error}"
        return "emulated on the CPU", None
    device = "cpu" if name in ("reference", "cpu") else str(_device(name))
    return f"on {device}", _BACKENDS[name].reason()


def _emulate_cuda() -> None:
    """Puts the CUDA kernels compiled for the CPU in the place of the cuda backend."""
    from fused_elbo import backends, ops

    from .emulation.build import build

    torch.ops.load_library(str(Path(build())))
    backends._BACKENDS["cuda"] = backends.Backend(
        "cuda", frozenset({"cpu"}), lambda: None, lambda: ops.kernels(EMULATED_NAMESPACE)
    )
    backends._selected.clear()


def _device(backend: str) -> torch.device:
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"backend {name}: {how}" for name, how in config.stash[_running].items()]
    return lines + [
        f"backend {name} NOT TESTED: {why}" for name, why in config.stash[_left_out].items()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = list(metafunc.config.stash[_running])
        if metafunc.definition.get_closest_marker("kernels"):
            names = [name for name in names if name != "reference"]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that everything in the test runs on."""
    from fused_elbo import use_backend

    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live."""
    return _device(backend)


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether a kernel costs milliseconds for each program: only small tensors, then."""
    return backend == "triton" and not torch.cuda.is_available()
