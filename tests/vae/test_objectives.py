"""Each objective is what its paper says, on cases that can be worked out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fused_elbo import DiagonalGaussian, NoiseKey, gaussian_kl
from fused_vae import VAE, GaussianLikelihood, importance, objectives

LL = torch.tensor([-10.0, -14.0])
KL = torch.tensor([2.0, 4.0])


def test_weighted_is_the_elbo_at_one() -> None:
    loss, elbo = objectives.weighted(LL, KL)
    assert loss == 15
    assert elbo.tolist() == [-12, -18]
    assert objectives.weighted(LL, KL, beta=3).loss == 21
    assert objectives.weighted(LL, KL, beta=3).elbo.tolist() == [-12, -18]


def test_warm_ups() -> None:
    linear = [objectives.linear_warm_up(s, 10) for s in (0, 5, 10, 20)]
    cosine = [objectives.cosine_warm_up(s, 10) for s in (0, 5, 10, 20)]
    cyclical = [objectives.cyclical_warm_up(s, 8) for s in (0, 2, 4, 7, 8, 10)]
    assert linear == [0, 0.5, 1, 1]
    assert cosine == pytest.approx([0, 0.5, 1, 1])
    assert objectives.cosine_warm_up(1, 10) < 0.05
    assert cyclical == [0, 0.5, 1, 1, 0, 0.5]


def test_free_bits_reduce_in_either_order() -> None:
    groups = [torch.tensor([0.0, 4.0]), torch.tensor([0.5, 0.5])]
    mean_first = objectives.free_bits(LL, groups, 1.0)
    assert mean_first.loss == 2 + 1 + 12  # max(1, 2) + max(1, 0.5)
    clamp_first = objectives.free_bits(LL, groups, 1.0, order="clamp_first")
    assert clamp_first.loss == 2.5 + 1 + 12  # mean of max(1, 0), max(1, 4)
    assert mean_first.elbo.tolist() == [-10.5, -18.5]
    with pytest.raises(ValueError, match="order must be"):
        objectives.free_bits(LL, groups, 1.0, order="other")  # type: ignore[arg-type]


def test_free_bits_have_no_gradient_under_the_floor() -> None:
    low = torch.tensor([0.1, 0.2], requires_grad=True)
    high = torch.tensor([3.0, 5.0], requires_grad=True)
    objectives.free_bits(LL, [low, high], 1.0).loss.backward()
    assert low.grad is None or low.grad.tolist() == [0, 0]
    assert high.grad is not None
    assert high.grad.tolist() == [0.5, 0.5]


def test_soft_free_bits_move_the_price_toward_the_floor() -> None:
    cheap, dear = objectives.SoftFreeBits(5.0, price=0.5), objectives.SoftFreeBits(1.0, price=0.5)
    assert cheap(LL, KL).loss == 12 + 0.5 * 3
    dear(LL, KL)
    assert cheap.price == pytest.approx(0.5 / 1.1)
    assert dear.price == pytest.approx(0.5 * 1.1)
    inside = objectives.SoftFreeBits(2.95, price=0.5)
    inside(LL, KL)
    assert inside.price == 0.5


def test_capacity_pulls_the_rate_from_both_sides() -> None:
    kl = torch.tensor([2.0, 4.0], requires_grad=True)
    objective = objectives.capacity(LL, kl, target=3.0, weight=10.0)
    objective.loss.backward()
    assert objective.loss == 10 + 12
    assert kl.grad is not None
    assert kl.grad.tolist() == [-5, 5]


def test_geco_raises_the_multiplier_until_the_distortion_is_met() -> None:
    strict, lax = objectives.GECO(target=5.0), objectives.GECO(target=20.0)
    assert strict(LL, KL).loss == pytest.approx(3 + 7)
    assert lax(LL, KL).loss == pytest.approx(3 - 8)
    assert strict.multiplier == pytest.approx(math.exp(0.07))
    assert lax.multiplier == pytest.approx(math.exp(-0.08))
    ll = LL.clone().requires_grad_()
    factor = strict.multiplier
    strict(ll, KL).loss.backward()
    assert ll.grad is not None
    assert ll.grad.tolist() == pytest.approx([-factor / 2] * 2)


def test_geco_finds_the_least_rate_at_its_distortion() -> None:
    """distortion 100 e^{-rate}: 10 is met at rate ln 10, where the multiplier is 1 / 10."""
    rate = torch.tensor([1.0], requires_grad=True)
    geco = objectives.GECO(target=10.0, speed=0.02, decay=0.5)
    optimizer = torch.optim.SGD([rate], lr=0.02)
    for _ in range(1000):
        optimizer.zero_grad()
        geco(-100 * (-rate).exp(), rate).loss.backward()
        optimizer.step()
    assert float(rate.detach()) == pytest.approx(math.log(10), rel=0.01)
    assert geco.multiplier == pytest.approx(0.1, rel=0.05)


def test_balanced_layers_pay_in_proportion_to_their_use() -> None:
    layers = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0])]
    half = objectives.balanced(LL, layers, [2, 1], beta=0.5)
    # used per dimension: 1 / 2 and 3 / 1, weights 2 * 1/7 and 2 * 6/7
    assert half.loss == pytest.approx(0.5 * (2 / 7 * 1 + 12 / 7 * 3) + 12)
    full = objectives.balanced(LL, layers, [2, 1], beta=1.0)
    assert full.loss == pytest.approx(4 + 12)
    assert full.elbo.tolist() == half.elbo.tolist() == [-13, -19]


def test_optimal_sigma_optimizes_the_logarithm_of_the_squared_error() -> None:
    x, mean = torch.rand(4, 3, 5), torch.rand(4, 3, 5, requires_grad=True)
    objective = objectives.optimal_sigma(x, mean, torch.zeros(4))
    (gradient,) = torch.autograd.grad(objective.loss, mean)
    mse = (x - mean).square().mean()
    (expected,) = torch.autograd.grad(15 / 2 * mse.log(), mean)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    value = 15 / 2 * (mse.log() + 1 + math.log(2 * math.pi))
    torch.testing.assert_close(objective.loss, value)


def test_beta_nll_goes_from_the_likelihood_to_the_squared_error() -> None:
    x, mean = torch.rand(4, 6), torch.rand(4, 6, requires_grad=True)
    logvar = torch.randn(4, 6)
    none = objectives.beta_nll(x, mean, logvar, torch.zeros(4), power=0.0)
    torch.testing.assert_close(none.loss, -none.elbo.mean())
    full = objectives.beta_nll(x, mean, logvar, torch.zeros(4), power=1.0)
    (gradient,) = torch.autograd.grad(full.loss, mean)
    torch.testing.assert_close(gradient, (mean - x).detach() / 4, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(full.elbo, none.elbo)


def test_mmd_tells_distributions_apart() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 3, generator=g), torch.randn(500, 3, generator=g)
    same, shifted = (objectives.maximum_mean_discrepancy(a, b + s) for s in (0.0, 1.0))
    assert 0 <= same < 0.01
    assert shifted > 0.1
    assert objectives.maximum_mean_discrepancy(a, a).abs() < 1e-6
    one = objectives.maximum_mean_discrepancy(torch.zeros(1, 2), torch.ones(1, 2))
    assert one == pytest.approx(2 - 2 * math.exp(-1))


def test_info_vae_prices() -> None:
    z, prior = torch.zeros(2, 2), torch.ones(1, 2)
    mmd = 2 - 2 * math.exp(-1)
    objective = objectives.info_vae(LL, KL, z, prior, alpha=0.5, weight=10.0)
    assert objective.loss == pytest.approx(0.5 * 3 + 12 + 9.5 * mmd, rel=1e-5)


def toy(shift: float = 0.0) -> tuple[VAE, Tensor]:
    """x = w z + sigma noise in one dimension, and its exact posterior (off by `shift`)."""
    w, sigma = 1.5, 0.5
    gain = w / (w * w + sigma**2)
    encoder, decoder = nn.Linear(1, 2).double(), nn.Linear(1, 1).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[gain], [0.0]], dtype=torch.float64))
        logvar = math.log(sigma**2 / (w * w + sigma**2))
        encoder.bias.copy_(torch.tensor([shift, logvar + shift], dtype=torch.float64))
        decoder.weight.fill_(w)
        decoder.bias.zero_()
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return VAE(encoder, decoder, GaussianLikelihood("fixed", sigma)), x * math.hypot(w, sigma)


def gradients(
    vae: VAE, x: Tensor, samples: int, estimator: importance.Estimator, seeds: int
) -> Tensor:
    """[seeds, parameters of the encoder and decoder]."""
    rows = []
    for seed in range(seeds):
        objective = importance.importance_weighted(
            vae, x, samples, estimator=estimator, key=NoiseKey(seed)
        )
        parts = torch.autograd.grad(objective.loss, list(vae.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_importance_weighted_bound_is_log_prob(estimator: importance.Estimator) -> None:
    vae, x = toy(0.3)
    key = NoiseKey(1)
    # log_prob folds the number of its chunk into the key
    objective = importance.importance_weighted(vae, x, 20, estimator=estimator, key=key.fold_in(0))
    torch.testing.assert_close(
        -objective.loss.detach(), vae.log_prob(x, 20, key=key, chunk=50).mean()
    )
    assert objective.elbo.mean() < -objective.loss


def test_stl_and_dreg_have_no_noise_at_the_exact_posterior() -> None:
    vae, x = toy()
    encoder = slice(0, 4)
    assert gradients(vae, x, 3, "stl", 3)[:, encoder].abs().max() < 1e-12
    assert gradients(vae, x, 3, "dreg", 3)[:, encoder].abs().max() < 1e-12
    assert gradients(vae, x, 3, "iwae", 3)[:, encoder].abs().max() > 1e-3


def test_dreg_has_the_mean_of_the_iwae_gradient_and_less_variance() -> None:
    vae, x = toy(0.4)
    iwae, dreg = (gradients(vae, x, 5, name, 200) for name in ("iwae", "dreg"))
    error = (iwae.var(0) / len(iwae) + dreg.var(0) / len(dreg)).sqrt()
    assert ((iwae.mean(0) - dreg.mean(0)).abs() < 5 * error + 1e-9).all()
    assert (dreg[:, :4].var(0) < iwae[:, :4].var(0)).all()


def test_stl_is_unbiased_for_one_sample_only() -> None:
    vae, x = toy(0.4)
    for samples, biased in ((1, False), (5, True)):
        iwae, stl = (gradients(vae, x, samples, name, 300)[:, 2:4] for name in ("iwae", "stl"))
        error = (iwae.var(0) / len(iwae) + stl.var(0) / len(stl)).sqrt()
        far = ((iwae.mean(0) - stl.mean(0)).abs() > 5 * error).any()
        assert bool(far) == biased


def test_importance_weighted_rejects_unknown_estimators() -> None:
    with pytest.raises(ValueError, match="estimator must be"):
        importance.importance_weighted(*toy(), 2, estimator="x")  # type: ignore[arg-type]


def correlated(size: int, correlation: float) -> tuple[DiagonalGaussian, Tensor]:
    """Posteriors whose mixture is a Gaussian with this correlation of two dimensions."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, 2, generator=g, dtype=torch.float64)
    spread = 0.5
    covariance = torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
    root = torch.linalg.cholesky(covariance - spread * torch.eye(2, dtype=torch.float64))
    q = DiagonalGaussian(x @ root.T, torch.full_like(x, math.log(spread)))
    return q, q.rsample(key=NoiseKey(0))


def rate_parts(q: DiagonalGaussian, z: Tensor) -> list[float]:
    prices = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    zeros = torch.zeros(len(z), dtype=z.dtype)
    # one batch of all the data: the weights of the estimator are then 1 / B
    return [
        float(importance.total_correlation(zeros, q, z, 1, alpha=a, beta=b, gamma=c).loss)
        for a, b, c in prices
    ]


def test_total_correlation_is_that_of_the_mixture() -> None:
    q, z = correlated(2000, 0.45)
    information, correlation, dimensions = rate_parts(q, z)
    assert correlation == pytest.approx(-0.5 * math.log(1 - 0.45**2), abs=0.03)
    assert dimensions == pytest.approx(0, abs=0.05)
    expected = float((q.log_prob(z) - DiagonalGaussian(z * 0, z * 0).log_prob(z)).mean())
    assert information + correlation + dimensions == pytest.approx(expected, rel=1e-6)
    assert float(gaussian_kl(q.mean, q.logvar).mean()) == pytest.approx(expected, abs=0.1)


def test_total_correlation_keeps_no_tensor_of_batch_squared_times_latent() -> None:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 20, generator=g, requires_grad=True)
    q = DiagonalGaussian(mean, torch.zeros(64, 20, requires_grad=True))
    z = q.rsample(key=NoiseKey(0))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = importance.total_correlation(torch.zeros(64), q, z, 1000).loss
    loss.backward()
    assert sum(kept.values()) < 5 * 64 * 64 + 100 * 64 * 2
    assert mean.grad is not None
    assert mean.grad.any()
