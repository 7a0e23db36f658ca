"""What every test of the operations runs under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_outputs_are_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an output element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
