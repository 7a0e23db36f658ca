"""The VAE computes what the papers say, exactly where the answer is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey
from fused_vae import (
    VAE,
    GaussianLikelihood,
    conv_decoder,
    conv_encoder,
    mlp_decoder,
    mlp_encoder,
)
from fused_vae.baseline import ProbabilisticPCA

KEY = NoiseKey(7)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def linear_vae(pca: ProbabilisticPCA) -> VAE:
    """A VAE whose decoder is the PPCA model and whose encoder is its exact posterior, which is
    diagonal because the columns of W are orthogonal."""
    w = pca.directions * (pca.variances - pca.noise_variance).sqrt()
    gain = w.T / pca.variances[:, None]
    logvar = (pca.noise_variance / pca.variances).log()
    encoder = linear(
        torch.cat([gain, torch.zeros_like(gain)]), torch.cat([-gain @ pca.mean, logvar])
    )
    likelihood = GaussianLikelihood("fixed", math.sqrt(pca.noise_variance))
    return VAE(encoder, linear(w, pca.mean), likelihood)


@pytest.fixture(scope="module")
def toy() -> tuple[VAE, Tensor, Tensor]:
    """A linear VAE, data, and the exact log p of the data."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(10, 3, generator=g, dtype=torch.float64)
    latent = torch.randn(500, 3, generator=g, dtype=torch.float64)
    noise = torch.randn(500, 10, generator=g, dtype=torch.float64)
    x = latent @ mixing.T + 0.5 * noise + 2
    pca = ProbabilisticPCA.fit(x, 3)
    w = pca.directions * (pca.variances - pca.noise_variance).sqrt()
    covariance = w @ w.T + pca.noise_variance * torch.eye(10, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(pca.mean, covariance).log_prob(x)
    return linear_vae(pca), x, exact


def widened(vae: VAE, logvar: float) -> VAE:
    """The same model with a posterior that is wrong: its log-variance is off."""
    encoder = vae.encoder
    assert isinstance(encoder, nn.Linear)
    shift = torch.cat([torch.zeros(3), torch.full((3,), logvar)]).double()
    return VAE(
        linear(encoder.weight.detach(), encoder.bias.detach() + shift), vae.decoder, vae.likelihood
    )


def test_ppca_log_prob_is_the_multivariate_normal_density(
    toy: tuple[VAE, Tensor, Tensor],
) -> None:
    _, x, exact = toy
    torch.testing.assert_close(ProbabilisticPCA.fit(x, 3).log_prob(x), exact)


@pytest.mark.parametrize("num_samples", [1, 7, 120])
def test_log_prob_is_exact_for_any_number_of_samples_when_the_posterior_is(
    toy: tuple[VAE, Tensor, Tensor], num_samples: int
) -> None:
    vae, x, exact = toy
    torch.testing.assert_close(vae.log_prob(x, num_samples, key=KEY), exact)


def test_mean_elbo_is_exact_when_the_posterior_is(toy: tuple[VAE, Tensor, Tensor]) -> None:
    vae, x, exact = toy
    draws = torch.stack([vae(x, key=KEY.fold_in(i)).elbo.mean() for i in range(40)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact.mean()) < 4 * error
    assert error < 0.01  # small enough for the claim to mean something


def test_log_prob_tightens_with_samples_and_stays_below_the_exact_value(
    toy: tuple[VAE, Tensor, Tensor],
) -> None:
    vae, x, exact = toy
    wrong = widened(vae, 1.0)
    bounds = [wrong.log_prob(x, k, key=KEY).mean() for k in (1, 10, 1000)]
    gaps = [float(exact.mean() - bound) for bound in bounds]
    # KL(q || posterior) of three dimensions whose log-variance is off by 1
    assert gaps[0] == pytest.approx(1.5 * (math.e - 2), rel=0.1)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > -0.01
    assert abs(gaps[2]) < 0.01


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_log_prob_counts_every_sample_whatever_the_chunk(
    toy: tuple[VAE, Tensor, Tensor], chunk: int
) -> None:
    vae, x, exact = toy
    bound = widened(vae, 0.5).log_prob(x, 100, key=KEY, chunk=chunk).mean()
    assert float(bound) == pytest.approx(float(exact.mean()), abs=0.02)


def test_log_prob_rejects_zero_samples(toy: tuple[VAE, Tensor, Tensor]) -> None:
    vae, x, _ = toy
    with pytest.raises(ValueError, match="num_samples"):
        vae.log_prob(x, 0)


IMAGE = (2, 9, 6)


@pytest.fixture(params=["unit", "fixed", "learned", "predicted"])
def likelihood(request: pytest.FixtureRequest) -> GaussianLikelihood:
    return GaussianLikelihood(request.param, 0.3, bounded=True)


@pytest.fixture(params=["conv", "mlp"])
def vae(request: pytest.FixtureRequest, likelihood: GaussianLikelihood) -> VAE:
    torch.manual_seed(0)
    outputs = likelihood.outputs
    if request.param == "conv":
        encoder = conv_encoder(IMAGE, 5, widths=(4, 8), hidden=16)
        decoder = conv_decoder(IMAGE, 5, widths=(4, 8), hidden=16, outputs=outputs)
    else:
        encoder, decoder = mlp_encoder(IMAGE, 5, (16,)), mlp_decoder(IMAGE, 5, (16,), outputs)
    return VAE(encoder, decoder, likelihood)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, *IMAGE, generator=torch.Generator().manual_seed(1))


def test_shapes(vae: VAE, x: Tensor) -> None:
    out = vae(x, key=KEY)
    assert out.loss.shape == ()
    assert out.log_likelihood.shape == out.kl.shape == out.elbo.shape == (4,)
    assert out.reconstruction.shape == x.shape == vae.reconstruct(x).shape
    assert vae.sample(3, 5, key=KEY).shape == (3, *IMAGE)
    assert vae.encode(x).mean.shape == (4, 5)
    assert vae.log_prob(x, 3, key=KEY).shape == (4,)


def test_forward_is_the_formula(vae: VAE, x: Tensor) -> None:
    out = vae(x, key=KEY, beta=0.5)
    mean, logvar = vae.encoder(x).chunk(2, dim=1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)
    decoded = vae.decoder(vae.encode(x).rsample(key=KEY))
    spread = {
        "unit": torch.zeros(()),
        "fixed": torch.tensor(2 * math.log(0.3)),
        "learned": vae.likelihood.logvar,
        "predicted": decoded[:, 2:],
    }[vae.likelihood.variance]
    assert isinstance(spread, Tensor)
    normal = torch.distributions.Normal(decoded[:, :2].sigmoid(), (spread / 2).exp())
    log_likelihood = normal.log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(out.kl, kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.log_likelihood, log_likelihood, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.loss, (0.5 * kl - log_likelihood).mean())
    torch.testing.assert_close(out.elbo, log_likelihood - kl, rtol=1e-5, atol=1e-4)


def test_every_parameter_is_trained(vae: VAE, x: Tensor) -> None:
    vae(x, key=KEY).loss.backward()
    untouched = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_the_key_decides_the_noise(vae: VAE, x: Tensor) -> None:
    assert torch.equal(vae(x, key=KEY).reconstruction, vae(x, key=KEY).reconstruction)
    assert not torch.equal(vae(x, key=KEY).reconstruction, vae(x, key=NoiseKey(8)).reconstruction)
    assert torch.equal(vae.log_prob(x, 5, key=KEY), vae.log_prob(x, 5, key=KEY))


def test_without_a_key_torch_manual_seed_decides(vae: VAE, x: Tensor) -> None:
    torch.manual_seed(3)
    first = vae(x).reconstruction
    second = vae(x).reconstruction
    torch.manual_seed(3)
    assert torch.equal(first, vae(x).reconstruction)
    assert not torch.equal(first, second)


def test_best_learned_sigma_is_the_root_mean_square_residual(x: Tensor) -> None:
    """The optimum of one shared variance (arXiv:2006.13202): there its gradient changes sign."""
    torch.manual_seed(0)
    model = VAE(mlp_encoder(IMAGE, 5, (8,)), mlp_decoder(IMAGE, 5, (8,)), GaussianLikelihood())
    logvar = model.likelihood.logvar
    assert isinstance(logvar, nn.Parameter)
    best = (model(x, key=KEY).reconstruction - x).square().mean().log().detach()
    gradients = []
    for offset in (-0.01, 0.0, 0.01):
        logvar.data = best + offset
        (gradient,) = torch.autograd.grad(model(x, key=KEY).loss, logvar)
        gradients.append(float(gradient))
    assert gradients[0] < -0.1
    assert gradients[1] == pytest.approx(0, abs=1e-3)
    assert gradients[2] > 0.1


def test_predicted_sigma_respects_its_floor() -> None:
    likelihood = GaussianLikelihood("predicted", floor=0.01)
    _, logvar = likelihood(torch.full((1, 2, 3, 3), -100.0))
    torch.testing.assert_close((logvar / 2).exp(), torch.full((1, 1, 3, 3), 0.01))


def test_likelihood_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="variance must be one of"):
        GaussianLikelihood("other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sigma must be positive"):
        GaussianLikelihood("fixed", 0.0)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (25, 25), (28, 28)])
def test_conv_pair_restores_any_size(size: tuple[int, int]) -> None:
    image = (1, *size)
    z = conv_encoder(image, 3)(torch.zeros(2, *image))
    assert z.shape == (2, 6)
    assert conv_decoder(image, 3)(z[:, :3]).shape == (2, *image)


def test_conv_pair_says_when_images_are_too_small() -> None:
    with pytest.raises(ValueError, match="3x8 pixels are too small"):
        conv_encoder((1, 3, 8), 2)
