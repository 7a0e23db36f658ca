"""pytest with an integration applied: for the tests of the library itself, or of code built on it.

    pytest -p fused_elbo.integrations.pytest_plugin --fused-elbo=diffusers tests/

applies `fused_elbo.integrations.diffusers` before the tests are collected, and puts everything back
at the end. What passes and fails must be what it is without the two options.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import pytest

__all__: list[str] = []

# Those whose `apply` needs no module or class of the user's.
_NAMES = ("diffusers", "distributions", "pyro", "pythae", "torch_functional")
_TAKE_NOISE = ("diffusers", "pythae")
_applied = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-elbo")
    group.addoption(
        "--fused-elbo",
        action="append",
        choices=_NAMES,
        default=[],
        metavar="NAME",
        help=f"apply this integration ({', '.join(_NAMES)}); may be given several times",
    )
    group.addoption(
        "--fused-elbo-noise",
        choices=("fused", "upstream"),
        default="fused",
        help="whose noise samples draw; upstream: the numbers of the library for the same seed",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_applied] = ExitStack()
    for name in config.getoption("--fused-elbo"):
        options = {"noise": config.getoption("--fused-elbo-noise")} if name in _TAKE_NOISE else {}
        try:
            integration: Any = importlib.import_module(f"fused_elbo.integrations.{name}")
            config.stash[_applied].enter_context(integration.applied(**options))
        except (ImportError, RuntimeError) as error:  # not installed, or of another version
            raise pytest.UsageError(str(error)) from error


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_applied].close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    names = config.getoption("--fused-elbo")
    return [f"fused-elbo: {', '.join(names)} applied"] if names else []
