"""The report's numbers, on Gaussian channels whose mutual information is known in closed form.

x ~ N(0, I), z | x ~ N(a x, s^2 I) with a^2 + s^2 = 1: then q(z) = N(0, I) is the prior exactly, and
the rate is the mutual information, d/2 ln(1 / s^2).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_elbo import DiagonalGaussian, NoiseKey
from fused_vae import analysis

COUNT = 2000


def channel(information: float, dims: int = 4) -> tuple[DiagonalGaussian, Tensor]:
    """Posteriors and one sample of each, with this I(x; z) in nats."""
    variance = math.exp(-2 * information / dims)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, dims, generator=g, dtype=torch.float64)
    mean = math.sqrt(1 - variance) * x
    q = DiagonalGaussian(mean, torch.full_like(mean, math.log(variance)))
    return q, q.rsample(key=NoiseKey(1))


OWN = torch.arange(COUNT)


def test_cross_log_density_is_the_density() -> None:
    q, z = channel(3.0)
    expected = q.log_prob(z)
    matrix = analysis.cross_log_density(z, q.mean, q.logvar)
    torch.testing.assert_close(matrix.diagonal(), expected)
    torch.testing.assert_close(
        matrix[5, 9], DiagonalGaussian(q.mean[9:10], q.logvar[9:10]).log_prob(z[5:6])[0]
    )


@pytest.mark.parametrize("information", [0.0, 0.5, 2.0, 4.0])
def test_bounds_enclose_the_mutual_information(information: float) -> None:
    q, z = channel(information)
    bounds = analysis.mutual_information(analysis.cross_log_density(z, q.mean, q.logvar), OWN)
    error = 4 * math.sqrt(4 / COUNT)  # each dimension's log-ratio has a variance of at most 1
    assert bounds.lower - error < information < bounds.upper + error
    assert bounds.upper - bounds.lower < 0.2 + 0.05 * information
    assert float(q.kl().mean()) == pytest.approx(information, abs=error)  # rate = I here


def test_equal_posteriors_have_no_information_by_either_bound() -> None:
    bounds = analysis.mutual_information(torch.full((2, 3), -1.7).double(), torch.tensor([0, 2]))
    assert bounds.lower == pytest.approx(0, abs=1e-12)
    assert bounds.upper == pytest.approx(0, abs=1e-12)  # the mean of the two others


def test_lower_bound_stops_at_ln_n_and_the_rate_goes_on() -> None:
    q, z = channel(30.0)
    bounds = analysis.mutual_information(analysis.cross_log_density(z, q.mean, q.logvar), OWN)
    assert bounds.cap == pytest.approx(math.log(COUNT))
    assert bounds.cap - 0.01 < bounds.lower <= bounds.cap + 1e-9
    assert bounds.upper > 12


@pytest.mark.parametrize(("information", "low", "high"), [(30.0, 0.99, 1.0), (0.0, 0.0, 0.01)])
def test_retrieval_turns_on_as_information_passes_ln_n(
    information: float, low: float, high: float
) -> None:
    q, z = channel(information)
    rank = analysis.ranks(analysis.cross_log_density(z, q.mean, q.logvar), OWN)
    assert low <= analysis.hit_rate(rank, COUNT - 1, COUNT) <= high


def test_retrieval_without_information_is_chance() -> None:
    q, z = channel(0.0)
    rank = analysis.ranks(analysis.cross_log_density(z, q.mean, q.logvar), OWN)
    for candidates in (1, 2, 10, 2000):
        assert analysis.hit_rate(rank, COUNT - 1, candidates) == pytest.approx(
            1 / candidates, rel=0.15, abs=1e-3
        )


def test_hit_rate_is_the_share_of_subsets_without_a_better_one() -> None:
    rank = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    # of 3 others, two drawn: r = 0 always wins, r = 1 in 1 of 3 subsets, r = 2 never
    assert analysis.hit_rate(rank, 3, 3) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert analysis.hit_rate(rank, 3, 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"1\.\.4, got 5"):
        analysis.hit_rate(rank, 3, 5)


def test_ranks_count_better_candidates_and_spread_ties() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 2.0]])
    assert analysis.ranks(scores, torch.tensor([2, 0])).tolist() == [2.0, 2.0]
    equal = torch.ones(4, 4)
    assert analysis.ranks(equal, torch.arange(4)).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_overlap_is_the_integral_of_the_geometric_mean() -> None:
    q = DiagonalGaussian(torch.tensor([[0.0], [1.5]]), torch.tensor([[0.0], [-1.0]]))
    grid = torch.linspace(-20, 20, 20001, dtype=torch.float64)
    densities = [
        torch.distributions.Normal(float(q.mean[i]), float(q.std[i])).log_prob(grid).exp()
        for i in range(2)
    ]
    expected = torch.trapezoid((densities[0] * densities[1]).sqrt(), grid)
    matrix = analysis.bhattacharyya(q)
    assert float(matrix[0, 1]) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(2, dtype=torch.float64))


def test_overlap_tells_classes_apart() -> None:
    mean = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    q = DiagonalGaussian(mean, torch.zeros(4, 1))
    result = analysis.overlap(q, torch.tensor([0, 0, 1, 1]))
    assert result.within == pytest.approx(math.exp(-0.01 / 8), rel=1e-5)
    assert result.between < 0.05
    unlabeled = analysis.overlap(q, None)
    assert math.isnan(unlabeled.within)
    assert result.between < unlabeled.between < result.within


def test_sampled_overlap_is_the_integral_on_average() -> None:
    """Many samples of each of three posteriors, against the closed form of their overlaps."""
    mean = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 1.5]])
    q = DiagonalGaussian(mean, torch.tensor([[0.0, 0.0], [0.4, 0.0], [-0.4, 0.2]]))
    labels = torch.tensor([0, 0, 1])
    z = q.rsample(4000, key=NoiseKey(1))
    sampled = [
        analysis.sampled_overlap(analysis.cross_log_density(draw, q.mean, q.logvar), labels)
        for draw in z
    ]
    exact = analysis.overlap(q, labels)
    for name in ("within", "between"):
        found = torch.tensor([getattr(overlap, name) for overlap in sampled])
        error = float(found.std()) / math.sqrt(len(found))
        assert error < 0.01
        assert float(found.mean()) == pytest.approx(getattr(exact, name), abs=4 * error)


def test_spread_tells_an_unused_dimension() -> None:
    g = torch.Generator().manual_seed(0)
    code = torch.randn(500, 3, generator=g) * torch.tensor([1.0, 0.2, 0.0])
    assert (analysis.spread(code) > analysis.ACTIVE_VARIANCE).tolist() == [True, True, False]
    torch.testing.assert_close(analysis.spread(code)[0], code[:, 0].double().var())
