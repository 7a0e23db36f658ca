"""A VAE with a flow or a prior of its own: exact where p(x) is known, plain where nothing is
added."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_elbo import DiagonalGaussian, NoiseKey, gaussian_log_likelihood
from fused_vae import (
    VAE,
    FlexibleVAE,
    GaussianLikelihood,
    GaussianMixture,
    InverseAutoregressiveFlow,
    PlanarFlow,
    RealNVP,
    VampPrior,
)
from fused_vae.flows import Flow
from fused_vae.iaf import MaskedNetwork
from fused_vae.importance import importance_weighted
from fused_vae.latents import cross_log_density
from fused_vae.priors import Prior

KEY = NoiseKey(11)
LATENT, PIXELS, BATCH = 2, 4, 6
SIGMA = 0.7


@pytest.fixture
def parts() -> tuple[nn.Linear, nn.Linear]:
    """A linear encoder that is not the exact posterior, and a linear decoder."""
    torch.manual_seed(0)
    encoder = nn.Linear(PIXELS, 2 * LATENT).double()
    encoder.weight.data *= 0.2
    encoder.bias.data[LATENT:] += 1.2  # wide, so that importance weights have a small variance
    return encoder, nn.Linear(LATENT, PIXELS).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(
        BATCH, PIXELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def build(
    parts: tuple[nn.Linear, nn.Linear], flow: Flow | None = None, prior: Prior | None = None
) -> FlexibleVAE:
    likelihood = GaussianLikelihood("fixed", SIGMA)
    return FlexibleVAE(*parts, likelihood, flow=flow, prior=prior)


def scrambled(module: nn.Module, strength: float = 0.25) -> nn.Module:
    torch.manual_seed(4)
    module.double()
    for parameter in module.parameters():
        parameter.data += strength * torch.randn_like(parameter)
    return module


def mixture() -> GaussianMixture:
    prior = GaussianMixture(LATENT, 3)
    scrambled(prior)
    return prior


def some_flows() -> list[Flow]:
    context = nn.Linear(PIXELS, 2 * (2 * LATENT + 1))
    flows: list[Flow] = [
        PlanarFlow(LATENT, 2, context),
        InverseAutoregressiveFlow(LATENT, 2, 8, nn.Linear(PIXELS, 16)),
    ]
    for flow in flows:
        scrambled(flow)
    return flows


def exact(
    decoder: nn.Linear, x: Tensor, mean: Tensor, variance: Tensor, log_weights: Tensor
) -> Tensor:
    """log p(x) for z ~ sum_k w_k N(mean_k, diag variance_k), x|z ~ N(W z + b, SIGMA^2 I)."""
    w = decoder.weight
    covariance = w @ torch.diag_embed(variance) @ w.T + SIGMA**2 * torch.eye(PIXELS)
    components = torch.distributions.MultivariateNormal(mean @ w.T + decoder.bias, covariance)
    return (components.log_prob(x[:, None]) + log_weights).logsumexp(1)


@torch.no_grad()
def test_without_flow_and_prior_it_is_the_plain_vae(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    plain, flexible = VAE(*parts, GaussianLikelihood("fixed", SIGMA)), build(parts)
    for a, b in zip(plain(x, key=KEY), flexible(x, key=KEY)):
        assert torch.equal(a, b)
    assert torch.equal(plain.log_prob(x, 7, key=KEY), flexible.log_prob(x, 7, key=KEY))
    assert torch.equal(plain.sample(5, LATENT, key=KEY), flexible.sample(5, LATENT, key=KEY))
    assert torch.equal(plain.reconstruct(x), flexible.reconstruct(x))


def open_gate() -> Flow:
    flow = InverseAutoregressiveFlow(LATENT, 3, 8).double()
    for step in flow.steps:
        assert isinstance(step, MaskedNetwork)
        step.outputs.weight.data.zero_()
        step.outputs.bias.data[LATENT:] = 60.0
    return flow


@pytest.mark.parametrize("identity", [lambda: PlanarFlow(LATENT, 3).double(), open_gate])
def test_flow_at_identity_equals_the_plain_vae(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor, identity: Callable[[], Flow]
) -> None:
    plain, flexible = VAE(*parts, GaussianLikelihood("fixed", SIGMA)), build(parts, identity())
    for a, b in zip(plain(x, key=KEY, beta=0.5), flexible(x, key=KEY, beta=0.5)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(vae(x, key=KEY).loss, [*parts[0].parameters(), *parts[1].parameters()])
        for vae in (plain, flexible)
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_prior_that_is_the_standard_normal_equals_the_plain_vae(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    prior = GaussianMixture(LATENT, 4).double()
    prior.mean.data.zero_()
    plain = VAE(*parts, GaussianLikelihood("fixed", SIGMA))
    for other in (prior, RealNVP(LATENT).double()):
        for a, b in zip(plain(x, key=KEY), build(parts, prior=other)(x, key=KEY)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_kl_is_log_q_minus_log_p_on_average_and_by_hand(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    """The estimate against the definition with the same sample: they differ by the closed form."""
    for flow in some_flows():
        vae = build(parts, flow, mixture())
        q_0 = vae.encode(x)
        z_0 = q_0.rsample(key=KEY)
        z, kl = vae.sample_kl(x, key=KEY)
        expected, log_det = flow(z_0, x)
        torch.testing.assert_close(z, expected)
        assert vae.prior is not None
        one_sample = q_0.log_prob(z_0) - log_det - vae.prior.log_prob(z)
        closed = q_0.kl() - (
            q_0.log_prob(z_0) - gaussian_log_likelihood(z_0, torch.zeros_like(z_0))
        )
        torch.testing.assert_close(kl, one_sample + closed)


@torch.no_grad()
def test_closed_form_part_makes_the_estimate_sharper(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    """Both estimates have one mean; the one in use has less variance for a narrow posterior."""
    vae = build(parts, prior=mixture())
    assert vae.prior is not None
    parts[0].bias.data[LATENT:] -= 4
    x = x[:1].expand(20_000, -1)
    q = vae.encode(x)
    z = q.rsample(key=KEY)
    plain = q.log_prob(z) - vae.prior.log_prob(z)
    kl = vae.sample_kl(x, key=KEY)[1]
    assert float(kl.mean()) == pytest.approx(float(plain.mean()), abs=0.03)
    assert float(kl.var()) < 0.1 * float(plain.var())


@torch.no_grad()
@pytest.mark.parametrize("which", [None, 0, 1])
def test_log_prob_is_exact_in_the_limit_with_any_flow_and_the_elbo_is_below(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor, which: int | None
) -> None:
    """The linear Gaussian model, whose log p(x) does not depend on the posterior."""
    flow = None if which is None else some_flows()[which]
    one = torch.ones(1, LATENT, dtype=torch.float64)
    truth = exact(parts[1], x, 0 * one, one, torch.zeros(1, dtype=torch.float64))
    _check_bounds(build(parts, flow), x, truth)


@torch.no_grad()
def test_log_prob_and_elbo_with_a_mixture_prior(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    """A linear decoder turns a mixture of Gaussians into a mixture of Gaussians."""
    prior = mixture()
    truth = exact(parts[1], x, prior.mean, prior.logvar.exp(), prior.logits.log_softmax(0))
    for flow in (None, *some_flows()):
        _check_bounds(build(parts, flow, prior), x, truth)


@torch.no_grad()
def test_log_prob_with_one_pseudo_input_is_that_of_its_posterior(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    encoder, decoder = parts
    u = torch.randn(1, PIXELS, dtype=torch.float64)
    mean, logvar = encoder(u).chunk(2, 1)
    truth = exact(decoder, x, mean, logvar.exp(), torch.zeros(1, dtype=torch.float64))
    _check_bounds(build(parts, prior=VampPrior(encoder, u)), x, truth)


@torch.no_grad()
def test_log_prob_with_real_nvp_is_the_integral_over_z(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor
) -> None:
    prior = RealNVP(LATENT, 4, 8)
    scrambled(prior, 0.2)
    line = torch.linspace(-12, 12, 401, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    normal = torch.distributions.Normal(parts[1](z), SIGMA)
    joint = torch.stack([normal.log_prob(row).sum(1) for row in x]) + prior.log_prob(z)
    truth = joint.logsumexp(1) + 2 * math.log(24 / 400)
    _check_bounds(build(parts, prior=prior), x, truth)


def _check_bounds(vae: FlexibleVAE, x: Tensor, truth: Tensor) -> None:
    """log_prob with many samples is the truth, the ELBO is below; both within 4 standard errors."""
    count = 20_000
    bound = vae.log_prob(x, count, key=KEY, chunk=count)
    q = vae.encode(x)
    log_weights = vae.log_weights(x, q.rsample(count, key=KEY.fold_in(0)), q)
    weights = (log_weights - log_weights.max(0).values).exp()
    error = weights.std(0) / weights.mean(0) / math.sqrt(count)
    assert error.max() < 0.03  # small enough for the claim to mean something
    assert ((bound - truth).abs() < 4 * error).all()
    elbo = vae(x.repeat(3000, 1), key=KEY).elbo.reshape(3000, -1)
    assert (elbo.mean(0) < truth + 4 * elbo.std(0) / math.sqrt(3000)).all()


@torch.no_grad()
def test_samples_of_the_model_follow_its_prior(parts: tuple[nn.Linear, nn.Linear]) -> None:
    prior = mixture()
    vae = build(parts, prior=prior)
    torch.testing.assert_close(
        vae.sample(9, LATENT, key=KEY), parts[1](prior.sample(9, key=KEY)), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=r"shape must be \(9, 2\) with this prior, got \(9, 3\)"):
        vae.sample(9, 3, key=KEY)


def test_every_parameter_is_trained(x: Tensor) -> None:
    for make in range(2):
        for prior in (mixture(), RealNVP(LATENT, 2, 4).double(), "vamp"):
            torch.manual_seed(0)
            encoder = nn.Linear(PIXELS, 2 * LATENT).double()
            decoder = nn.Linear(LATENT, PIXELS).double()
            chosen = VampPrior(encoder, x[:2]) if isinstance(prior, str) else prior
            if isinstance(chosen, RealNVP):
                scrambled(chosen)
            vae = build((encoder, decoder), some_flows()[make], chosen)
            vae(x, key=KEY).loss.backward()
            untouched = {n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()}
            assert untouched == set()


def test_gradients_of_the_loss(parts: tuple[nn.Linear, nn.Linear], x: Tensor) -> None:
    """Through the fused sample, flow, prior and loss, in one gradcheck."""
    for flow in some_flows():
        vae = build(parts, flow, mixture())
        names = [name for name, _ in vae.named_parameters()]

        def loss(*values: Tensor, vae: FlexibleVAE = vae, names: list[str] = names) -> Tensor:
            out = torch.func.functional_call(vae, dict(zip(names, values)), x, {"key": KEY})
            result: Tensor = out.loss
            return result

        assert torch.autograd.gradcheck(loss, tuple(vae.parameters()))


def test_flow_and_prior_make_the_bound_tighter_when_trained() -> None:
    """x = z_1^2 plus noise: the posterior of z_1 has two ends, and a Gaussian must choose one."""
    g = torch.Generator().manual_seed(0)

    class Square(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.square().sum(1, keepdim=True)

    x = torch.randn(256, 1, generator=g).square() + 0.3 * torch.randn(256, 1, generator=g)
    final = {}
    for name in ("plain", "flow"):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 2))
        context = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 4 * 3))
        flow = PlanarFlow(1, 4, context) if name == "flow" else None
        vae = FlexibleVAE(encoder, Square(), GaussianLikelihood("fixed", 0.3), flow=flow)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
        for step in range(400):
            optimizer.zero_grad()
            vae(x, key=KEY.fold_in(step)).loss.backward()
            optimizer.step()
        with torch.no_grad():
            final[name] = float(
                torch.stack([vae(x, key=KEY.fold_in(-1 - i)).elbo.mean() for i in range(50)]).mean()
            )
    assert final["flow"] > final["plain"] + 0.1


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_importance_weighted_objectives_agree_with_log_prob(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor, estimator: str
) -> None:
    """Their weights are those of the base sample, so every estimator still holds."""
    vae = build(parts, some_flows()[1], mixture())
    loss = importance_weighted(vae, x, 5, estimator=estimator, key=KEY).loss  # type: ignore[arg-type]
    q: DiagonalGaussian = vae.encode(x)
    with torch.no_grad():
        bound = vae.log_weights(x, q.rsample(5, key=KEY), q).logsumexp(0) - math.log(5)
    torch.testing.assert_close(loss.detach(), -bound.mean())


@pytest.mark.parametrize("which", [0, 1])
def test_half_precision_keeps_nats_in_float32(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor, which: int
) -> None:
    """Under bfloat16 autocast the rate is that of float32, to the rounding of z."""
    for prior in (mixture(), RealNVP(LATENT, 2, 4), VampPrior(parts[0], x[:2])):
        vae = build(parts, some_flows()[which], prior).float()
        with torch.no_grad():
            full = vae(x.float(), key=KEY)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = vae(x.float(), key=KEY)
        assert low.kl.dtype == torch.float32
        torch.testing.assert_close(low.kl, full.kl, rtol=0.05, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1])
def test_density_of_every_code_under_every_posterior(
    parts: tuple[nn.Linear, nn.Linear], x: Tensor, which: int
) -> None:
    """One's own is known without inverting; the density of each posterior integrates to 1."""
    vae = build(parts, some_flows()[which])
    q_0 = vae.encode(x)
    z_0 = q_0.rsample(key=KEY)
    z, log_det = vae.transform(z_0, x)
    found = cross_log_density(vae, z, x)
    torch.testing.assert_close(found.diagonal(), q_0.log_prob(z_0) - log_det)
    line = torch.linspace(-25, 25, 251, dtype=torch.float64)
    density = cross_log_density(vae, torch.cartesian_prod(line, line), x[:3]).exp()
    torch.testing.assert_close(density.sum(0) * 0.2**2, torch.ones(3).double(), rtol=0, atol=5e-3)
