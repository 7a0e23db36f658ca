"""Shared by the tests of the VAE."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fused_vae import data
from fused_vae.data import Images


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, above all where other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Images]:
    """scikit-learn's, to train on and held out."""
    return data.load("digits").split(0.1, seed=0)
