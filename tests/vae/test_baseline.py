"""Probabilistic PCA is the maximum of the likelihood that it claims to be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fused_vae import baseline
from fused_vae.baseline import ProbabilisticPCA


@pytest.fixture
def x() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(60, 2, 3, generator=g) * torch.arange(1, 7).reshape(2, 3)


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_no_other_noise_is_more_likely(x: torch.Tensor, scale: float) -> None:
    best = ProbabilisticPCA.fit(x, 2)
    other = replace(best, noise_variance=best.noise_variance * scale)
    assert other.log_prob(x).sum() < best.log_prob(x).sum()


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_no_other_scale_of_the_latent_is_more_likely(x: torch.Tensor, scale: float) -> None:
    best = ProbabilisticPCA.fit(x, 2)
    other = replace(best, variances=best.variances * scale)
    assert other.log_prob(x).sum() < best.log_prob(x).sum()


def test_more_latent_dimensions_fit_better(x: torch.Tensor) -> None:
    values = [float(ProbabilisticPCA.fit(x, q).log_prob(x).mean()) for q in range(1, 6)]
    assert values == sorted(values)


def test_fewer_images_than_pixels_gives_the_same_model(x: torch.Tensor) -> None:
    """Both eigenproblems, of the covariance and of the Gram matrix, on the same data."""
    few = x[:5].flatten(1)
    gram = ProbabilisticPCA.fit(few, 2)
    repeated = ProbabilisticPCA.fit(few.repeat(4, 1), 2)  # the same covariance, of 20 images
    torch.testing.assert_close(gram.variances, repeated.variances)
    torch.testing.assert_close(gram.log_prob(few), repeated.log_prob(few))


def test_sigma_does_not_fall_below_the_floor() -> None:
    x = torch.zeros(10, 4)
    x[:, 0] = torch.arange(10)
    assert ProbabilisticPCA.fit(x, 1, floor=0.1).noise_variance == pytest.approx(0.01)
    assert math.isfinite(ProbabilisticPCA.fit(x, 1, floor=0.1).log_prob(x).sum())


def test_large_images_are_fitted_on_the_first(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "LARGE", 5)
    few = ProbabilisticPCA.fit(x, 2)
    torch.testing.assert_close(few.mean, x[:5].flatten(1).double().mean(0))
