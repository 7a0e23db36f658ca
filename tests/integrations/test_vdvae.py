"""VDVAE's functions, against float64 of its formulas."""

import types

import pytest
import torch

from fused_elbo.integrations import vdvae
from tests.integrations import eager


def tensors(count, *shape):
    return [torch.randn(shape).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("prior", [(3, 4, 5, 6), (1, 4, 1, 1)])
def test_kl_and_its_four_gradients_are_those_of_the_formula(prior):
    (mu1, logsigma1), (mu2, logsigma2) = tensors(2, 3, 4, 5, 6), tensors(2, *prior)
    inputs = mu1, mu2, logsigma1, logsigma2
    kl = vdvae.gaussian_analytical_kl(*inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = eager.gaussian_analytical_kl(*exact)
    torch.testing.assert_close(kl.double(), expected, rtol=2e-6, atol=1e-6)
    upstream = torch.randn_like(kl)
    gradients = torch.autograd.grad(kl, inputs, upstream)
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, upstream.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_samples_have_the_mean_and_deviation_and_carry_gradients():
    mu, logsigma = tensors(2, 64, 1024)
    z = vdvae.draw_gaussian_diag_samples(mu, logsigma)
    eps = ((z - mu) / logsigma.exp()).detach()
    assert abs(eps.mean()) < 4 / 256 and abs(eps.var() - 1) < 4 * 2**0.5 / 256
    grad_mu, grad_logsigma = torch.autograd.grad(z.sum(), (mu, logsigma))
    assert torch.equal(grad_mu, torch.ones_like(mu))
    torch.testing.assert_close(grad_logsigma, (z - mu).detach(), rtol=1e-5, atol=1e-5)


def test_named_modules_are_replaced_and_restored():
    helpers, model = types.ModuleType("vae_helpers"), types.ModuleType("vae")
    for name in ("gaussian_analytical_kl", "draw_gaussian_diag_samples"):
        setattr(helpers, name, getattr(eager, name))
    model.gaussian_analytical_kl = eager.gaussian_analytical_kl
    with vdvae.applied(helpers, model):
        assert model.gaussian_analytical_kl is vdvae.gaussian_analytical_kl
        assert helpers.draw_gaussian_diag_samples is vdvae.draw_gaussian_diag_samples
        assert not hasattr(model, "draw_gaussian_diag_samples")
    assert helpers.gaussian_analytical_kl is eager.gaussian_analytical_kl
    assert model.gaussian_analytical_kl is eager.gaussian_analytical_kl


def test_scripted_functions_are_known_by_their_schema():
    helpers = types.ModuleType("vae_helpers")

    @torch.jit.script
    def draw_gaussian_diag_samples(mu, logsigma):
        return mu + torch.exp(logsigma)

    helpers.draw_gaussian_diag_samples = draw_gaussian_diag_samples
    with vdvae.applied(helpers):
        assert helpers.draw_gaussian_diag_samples is vdvae.draw_gaussian_diag_samples
    assert helpers.draw_gaussian_diag_samples is draw_gaussian_diag_samples


def test_modules_without_the_functions_or_with_others_are_refused():
    empty, other = types.ModuleType("empty"), types.ModuleType("other")
    other.gaussian_analytical_kl = lambda mu, logvar: None
    with pytest.raises(RuntimeError, match="empty has none of gaussian_analytical_kl"):
        vdvae.apply(empty)
    with pytest.raises(RuntimeError, match=r"must take \(mu1, mu2, logsigma1, logsigma2\)"):
        vdvae.apply(other)
    with pytest.raises(TypeError, match="name the modules"):
        vdvae.apply()
    with pytest.raises(TypeError, match="expected modules, got function"):
        vdvae.apply(eager.gaussian_analytical_kl)
