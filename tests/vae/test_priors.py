"""Priors: densities that integrate to one, samples that follow them, gradients that are theirs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey
from fused_vae import GaussianMixture, RealNVP, VampPrior
from fused_vae.priors import Prior
from fused_vae.real_nvp import AffineCoupling

KEY = NoiseKey(5)
COUNT = 20_000


def mixture() -> Prior:
    torch.manual_seed(0)
    prior = GaussianMixture(2, 3).double()
    prior.mean.data *= 2
    prior.logvar.data = torch.randn(3, 2, dtype=torch.float64)
    prior.logits.data = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    return prior


def vamp() -> Prior:
    torch.manual_seed(1)
    return VampPrior(nn.Linear(4, 4).double(), torch.randn(3, 4, dtype=torch.float64))


def real_nvp() -> Prior:
    torch.manual_seed(2)
    prior = RealNVP(2, 4, 16).double()
    for parameter in prior.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return prior


@pytest.fixture(params=[mixture, vamp, real_nvp], ids=lambda build: build.__name__)
def prior(request: pytest.FixtureRequest) -> Prior:
    build: Callable[[], Prior] = request.param
    return build()


@torch.no_grad()
def integrate(prior: Prior) -> tuple[Tensor, Tensor]:
    """Points of a grid, and the probability of the cell around each."""
    line = torch.linspace(-18, 18, 401, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    return z, prior.log_prob(z).exp() * (line[1] - line[0]) ** 2


def test_density_integrates_to_one(prior: Prior) -> None:
    assert float(integrate(prior)[1].sum()) == pytest.approx(1, abs=1e-4)


def test_samples_follow_the_density(prior: Prior) -> None:
    """Mean and covariance of the samples against the integrals over the grid."""
    z, mass = integrate(prior)
    mean = mass @ z
    covariance = (mass[:, None] * (z - mean)).T @ (z - mean)
    drawn = prior.sample(COUNT, key=KEY)
    assert drawn.shape == (COUNT, 2)
    error = 5 * (covariance.diagonal() / COUNT).sqrt()
    assert ((drawn.mean(0) - mean).abs() < error).all()
    scale = (covariance.diagonal()[:, None] * covariance.diagonal()).sqrt()
    assert ((drawn.T.cov() - covariance).abs() / scale).max() < 0.08


def test_key_decides_the_samples(prior: Prior) -> None:
    assert torch.equal(prior.sample(50, key=KEY), prior.sample(50, key=KEY))
    assert not torch.equal(prior.sample(50, key=KEY), prior.sample(50, key=NoiseKey(6)))
    torch.manual_seed(0)
    first = prior.sample(50)
    torch.manual_seed(0)
    assert torch.equal(first, prior.sample(50))
    assert not torch.equal(first, prior.sample(50))


def test_any_leading_shape(prior: Prior) -> None:
    z = torch.randn(4, 5, 2, dtype=torch.float64)
    expected = torch.stack([prior.log_prob(part) for part in z])
    torch.testing.assert_close(prior.log_prob(z), expected)


def test_gradients(prior: Prior) -> None:
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in prior.named_parameters()]
    at = _LogProb(prior)

    def run(z: Tensor, *values: Tensor) -> Tensor:
        parameters = {f"prior.{name}": value for name, value in zip(names, values)}
        out: Tensor = torch.func.functional_call(at, parameters, z)
        return out

    assert torch.autograd.gradcheck(run, (z, *prior.parameters()))


class _LogProb(nn.Module):
    """`functional_call` calls forward."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, z: Tensor) -> Tensor:
        return self.prior.log_prob(z)


@torch.no_grad()
def test_mixture_is_the_mixture_distribution() -> None:
    prior = mixture()
    assert isinstance(prior, GaussianMixture)
    components = torch.distributions.Independent(
        torch.distributions.Normal(prior.mean, (prior.logvar / 2).exp()), 1
    )
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=prior.logits), components
    )
    z = torch.randn(7, 2, dtype=torch.float64) * 3
    torch.testing.assert_close(prior.log_prob(z), truth.log_prob(z))


@torch.no_grad()
def test_mixture_chooses_components_by_their_weights() -> None:
    prior = GaussianMixture(1, 3).double()
    prior.mean.data = torch.tensor([[-100.0], [0.0], [100.0]], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    prior.logits.data = weights.log()
    chosen = (prior.sample(COUNT, key=KEY)[:, 0] / 100).round() + 1
    share = torch.bincount(chosen.long(), minlength=3) / COUNT
    assert ((share - weights).abs() < 4 * (weights * (1 - weights) / COUNT).sqrt()).all()


def test_vamp_prior_with_one_pseudo_input_is_its_posterior() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(6, 8).double()
    u = torch.randn(1, 6, dtype=torch.float64)
    prior = VampPrior(encoder, u)
    mean, logvar = encoder(u)[0].chunk(2)
    truth = torch.distributions.Normal(mean, (logvar / 2).exp())
    z = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(prior.log_prob(z), truth.log_prob(z).sum(1))


def test_vamp_prior_trains_pseudo_inputs_and_encoder_but_owns_only_the_first() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(6, 8)
    start = torch.randn(3, 6)
    prior = VampPrior(encoder, start)
    prior.log_prob(torch.randn(5, 4)).sum().backward()
    assert prior.pseudo_inputs.grad is not None
    assert prior.pseudo_inputs.grad.any()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.any()
    assert list(prior.state_dict()) == ["pseudo_inputs"]
    prior.pseudo_inputs.data += 1
    assert not torch.equal(prior.pseudo_inputs, start)  # what it was given is left alone
    assert start.grad_fn is None
    pair = copy.deepcopy(nn.ModuleList([encoder, prior]))
    copied = pair[1]
    assert isinstance(copied, VampPrior)
    assert copied._encoder[0] is pair[0]


@torch.no_grad()
def test_real_nvp_is_invertible() -> None:
    for latent in (1, 2, 5):
        torch.manual_seed(latent)
        prior = RealNVP(latent, 6, 16).double()
        for parameter in prior.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        z = 2 * torch.randn(50, latent, dtype=torch.float64)
        eps, _ = prior(z)
        assert float((eps - z).abs().max()) > 0.1
        torch.testing.assert_close(prior.inverse(eps), z, rtol=1e-9, atol=1e-9)


def test_real_nvp_log_determinant_is_that_of_the_jacobian() -> None:
    prior = real_nvp()
    z = torch.randn(5, 2, dtype=torch.float64)
    log_det = prior(z)[1]
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda z: prior(z[None])[0][0], z[row])
        torch.testing.assert_close(log_det[row], jacobian.logdet())


def test_couplings_together_change_every_dimension() -> None:
    prior = RealNVP(5, 2, 8)
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    z = torch.randn(3, 5)
    assert (prior(z)[0] != z).all()


def test_coupling_changes_only_its_half() -> None:
    for parity in (0, 1):
        coupling = AffineCoupling(5, 8, parity)
        for parameter in coupling.parameters():
            nn.init.normal_(parameter)
        z = torch.randn(3, 5)
        changed = (coupling(z)[0] != z).all(0)
        assert changed.tolist() == [index % 2 != parity for index in range(5)]


@torch.no_grad()
def test_real_nvp_starts_as_the_standard_normal() -> None:
    z = torch.randn(5, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(RealNVP(3).log_prob(z), expected)


def test_bad_arguments_are_refused(prior: Prior) -> None:
    name = type(prior).__name__
    with pytest.raises(ValueError, match=rf"{name}: z must have shape \[\.\.\., 2\], got \(5, 3\)"):
        prior.log_prob(torch.zeros(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"{name}: count must be a positive whole number, got 0"):
        prior.sample(0)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="GaussianMixture: components must be a positive whole"):
        GaussianMixture(2, 0)
    with pytest.raises(ValueError, match="RealNVP: couplings must be a positive whole"):
        RealNVP(2, 0)
    with pytest.raises(ValueError, match=r"VampPrior: pseudo_inputs must have shape \[K"):
        VampPrior(nn.Identity(), torch.zeros(0, 3))


def test_standard_deviation_of_one_dimension_is_that_of_its_integral() -> None:
    """RealNVP over one dimension is a Gaussian; its scale is what the parameters say."""
    prior = RealNVP(1, 2, 4).double()
    coupling = prior.couplings[1]  # parity 1 keeps odd dimensions, so it changes dimension 0
    assert isinstance(coupling, AffineCoupling)
    last = coupling.network[-1]
    assert isinstance(last, nn.Linear)
    last.bias.data = torch.tensor([0.7, 1.5], dtype=torch.float64)
    truth = torch.distributions.Normal(
        torch.tensor(-1.5 * math.exp(-math.tanh(0.7)), dtype=torch.float64),
        math.exp(-math.tanh(0.7)),
    )
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(prior.log_prob(z), truth.log_prob(z)[:, 0])


@torch.no_grad()
def test_choice_of_a_component_and_the_place_in_it_are_independent() -> None:
    prior = GaussianMixture(1, 2).double()
    prior.mean.data = torch.tensor([[-100.0], [100.0]], dtype=torch.float64)
    drawn = prior.sample(COUNT, key=KEY)[:, 0]
    for center in (-100, 100):
        offset = drawn[(drawn - center).abs() < 50] - center
        assert abs(float(offset.mean())) < 4 / math.sqrt(len(offset))
