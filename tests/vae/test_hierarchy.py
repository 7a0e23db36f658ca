"""Several stochastic layers: the rate is the sum of KLs between posterior and prior of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_elbo import NoiseKey
from fused_vae import GaussianLikelihood
from fused_vae.hierarchy import HierarchicalVAE

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
