"""Every test runs on the CPU backend; without a fast path there is nothing to test."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_elbo
from fused_elbo import (
    fastpath,
    reparameterize,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = fastpath.reason()
    for item in items:
        if reason is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"no fast path here: {reason}"))


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with fused_elbo.use_backend("cpu"):
        reparameterize(torch.zeros(1, 1), torch.zeros(1, 1))  # loads the extension
        yield


@pytest.fixture(params=["directly", "by the dispatcher"])
def called(request: pytest.FixtureRequest) -> Iterator[None]:
    """How operations are called: on a GPU always by the dispatcher."""
    compiled = importlib.import_module("fused_elbo._fastpath")
    compiled.set_direct_calls(request.param == "directly")
    yield
    compiled.set_direct_calls(True)
