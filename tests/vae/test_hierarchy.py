"""Several stochastic layers: the rate is the sum of KLs between posterior and prior of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey
from fused_vae import GaussianLikelihood
from fused_vae.hierarchy import HierarchicalVAE
from fused_vae.latents import cross_log_density

IMAGE = (1, 4, 5)
KEY = NoiseKey(3)


@pytest.fixture
def vae() -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE(IMAGE, (2, 3, 4), GaussianLikelihood("fixed", 0.5), width=16)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, *IMAGE, generator=torch.Generator().manual_seed(0))


def test_shapes(vae: HierarchicalVAE, x: Tensor) -> None:
    out = vae(x, key=KEY)
    assert out.layer_kl.shape == (3, 6)
    assert out.reconstruction.shape == x.shape
    assert vae.sample(5, key=KEY).shape == (5, *IMAGE)


def test_parts_add_up(vae: HierarchicalVAE, x: Tensor) -> None:
    out = vae(x, key=KEY, beta=0.5)
    torch.testing.assert_close(out.kl, out.layer_kl.sum(0).detach())
    assert (out.layer_kl > 0).all()
    torch.testing.assert_close(out.loss, (0.5 * out.kl - out.log_likelihood).mean())
    normal = torch.distributions.Normal(out.reconstruction, 0.5)
    torch.testing.assert_close(out.log_likelihood, normal.log_prob(x).sum((1, 2, 3)).detach())


def test_each_layer_is_the_kl_between_two_normals(vae: HierarchicalVAE, x: Tensor) -> None:
    """Followed by hand with the sampled z: from the loss's own layers, top first."""
    out = vae(x, key=KEY)
    captured: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda m, i, o: captured.append(o))
        for pair in zip(vae.posterior, [None, *vae.prior])
        for module in pair
        if module is not None
    ]
    vae(x, key=KEY)
    for handle in handles:
        handle.remove()
    zeros = torch.zeros(6, 2)
    pairs = [(captured[0], torch.cat([zeros, zeros], 1)), tuple(captured[1:3]), tuple(captured[3:])]
    for layer, (posterior, prior) in enumerate(pairs):
        normals = [
            torch.distributions.Normal(mean, (logvar / 2).exp())
            for mean, logvar in (posterior.chunk(2, 1), prior.chunk(2, 1))
        ]
        expected = torch.distributions.kl_divergence(*normals).sum(1)
        torch.testing.assert_close(out.layer_kl[layer], expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_trained(vae: HierarchicalVAE, x: Tensor) -> None:
    vae(x, key=KEY).loss.backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_layers_draw_independent_noise(x: Tensor) -> None:
    torch.manual_seed(0)
    vae = HierarchicalVAE(IMAGE, (4, 4), GaussianLikelihood("fixed", 0.5), width=8)
    draws: list[Tensor] = []
    for block in vae.down:
        block.register_forward_pre_hook(lambda m, inputs: draws.append(inputs[0][:, -4:]))
    with torch.no_grad():
        for moments in [*vae.posterior, *vae.prior]:
            assert isinstance(moments, torch.nn.Linear)
            moments.weight.zero_()
            moments.bias.zero_()
    vae(x, key=KEY)
    assert not torch.allclose(draws[0], draws[1])
    assert torch.equal(vae.sample(6, key=KEY), vae.sample(6, key=KEY))


def test_training_uses_the_lower_layer_too() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=g) @ torch.randn(3, 20, generator=g)
    x = x.reshape(64, *IMAGE)
    torch.manual_seed(0)
    vae = HierarchicalVAE(IMAGE, (1, 3), GaussianLikelihood("fixed", 0.3), width=32)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    first = float(vae(x, key=KEY).elbo.mean())
    for step in range(300):
        optimizer.zero_grad()
        vae(x, key=KEY.fold_in(step)).loss.backward()
        optimizer.step()
    out = vae(x, key=KEY)
    assert float(out.elbo.mean()) > first / 4  # both are negative
    assert float(out.layer_kl[1].detach().mean()) > 1


@pytest.mark.parametrize("latents", [(), (3, 0)])
def test_bad_layers_are_refused(latents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latents must be one positive size per layer"):
        HierarchicalVAE(IMAGE, latents, GaussianLikelihood())


def test_parts_of_a_pass_agree_with_the_pass(vae: HierarchicalVAE, x: Tensor) -> None:
    out = vae(x, key=KEY)
    z, kl = vae.sample_kl(x, key=KEY)
    each = vae.sample_kl(x, key=KEY, reduction="none")[1]
    assert z.shape == each.shape == (6, 9)
    torch.testing.assert_close(kl, out.kl)
    layers = torch.stack([part.sum(1) for part in each.split(vae.latents, 1)])
    torch.testing.assert_close(layers, out.layer_kl)
    torch.testing.assert_close(vae.decode(z)[0], out.reconstruction)
    code = vae.code(x)
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(code)[0])
    seen, states = vae.way_up(x), vae.states(code)
    for layer, part in enumerate(code.split(vae.latents, 1)):
        torch.testing.assert_close(
            vae.posterior_moments(layer, states[layer], seen[layer])[0], part
        )


def linear(vae: HierarchicalVAE) -> None:
    """Every block affine, so that p(x) is a Gaussian."""
    for blocks in (vae.up, vae.down):
        for block in blocks:
            assert isinstance(block, nn.Sequential)
            block[1] = nn.Identity()
    for prior in vae.prior:  # a fixed variance
        assert isinstance(prior, nn.Linear)
        half = prior.out_features // 2
        prior.weight.data[half:] = 0
        prior.weight.data[:half] *= 5
    for posterior in vae.posterior:  # wide, so that importance weights have a small variance
        assert isinstance(posterior, nn.Linear)
        posterior.weight.data *= 0.3
        posterior.bias.data[posterior.out_features // 2 :] += 0.7


@torch.no_grad()
def test_log_prob_is_exact_in_the_limit_and_the_elbo_is_below() -> None:
    """An affine ladder: the mean and covariance of x are those of its samples from the prior."""
    torch.manual_seed(1)
    image = (1, 1, 3)
    vae = HierarchicalVAE(image, (1, 2), GaussianLikelihood("fixed", 0.7), width=4).double()
    linear(vae)

    def decoded(noise: Tensor) -> Tensor:
        """z_1 = noise_1, z_2 = mean + std * noise_2."""
        z = noise.clone()
        mean, logvar = vae.prior_moments(1, vae.states(z)[1])
        assert mean is not None
        assert logvar is not None
        z[:, 1:] = mean + (logvar / 2).exp() * noise[:, 1:]
        return vae.decode(z)[0].flatten(1)

    offset = decoded(torch.zeros(1, 3, dtype=torch.float64))
    w = decoded(torch.eye(3, dtype=torch.float64)) - offset  # [noise, pixels]
    covariance = w.T @ w + 0.49 * torch.eye(3, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(offset[0], covariance)
    x = exact.sample((4,)).reshape(4, *image)
    truth = exact.log_prob(x.flatten(1))
    count = 20_000
    many = x.repeat_interleave(count, 0)
    z, _ = vae.sample_kl(many, key=KEY)
    log_weight = vae.log_weight(many, z).reshape(4, count)
    bound = log_weight.logsumexp(1) - math.log(count)
    weights = (log_weight - bound[:, None]).exp()
    error = weights.std(1) / math.sqrt(count)
    assert error.max() < 0.03  # small enough for the claim to mean something
    assert ((bound - truth).abs() < 4 * error).all()
    elbo = vae(many, key=KEY).elbo.reshape(4, count)
    assert (elbo.mean(1) < truth + 4 * elbo.std(1) / math.sqrt(count)).all()
    few = vae.log_prob(x, 200, key=KEY)
    weighed = [vae.log_weight(x, vae.sample_kl(x, key=KEY.fold_in(i))[0]) for i in range(200)]
    torch.testing.assert_close(few, torch.stack(weighed).logsumexp(0) - math.log(200))


@torch.no_grad()
def test_density_of_every_code_under_every_posterior(vae: HierarchicalVAE, x: Tensor) -> None:
    z, _ = vae.sample_kl(x, key=KEY)
    found = cross_log_density(vae, z[:4], x)
    assert found.shape == (4, 6)
    exact = vae.double()
    for i in range(4):
        for j in range(6):
            code = z[i : i + 1].double()
            seen, states = exact.way_up(x[j : j + 1].double()), exact.states(code)
            expected = 0.0
            for layer, part in enumerate(code.split(vae.latents, 1)):
                mean, logvar = exact.posterior_moments(layer, states[layer], seen[layer])
                expected += float(
                    torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(part).sum()
                )
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-9)
