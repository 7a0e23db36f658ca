"""latent-diffusion: its regularizer and its posterior class, against plain PyTorch."""

import pytest
import torch

from fused_elbo.integrations import ldm
from tests.integrations import eager


def fresh_class():
    """A class of its own for each test, with the methods of the eager one."""
    methods = vars(eager.DiagonalGaussianDistribution).items()
    own = {name: value for name, value in methods if callable(value)}
    return type("DiagonalGaussianDistribution", (), own)


@pytest.mark.parametrize("shape", [(3, 8, 5, 6), (2, 8, 3, 4, 5)])
def test_the_regularizer_samples_and_averages_the_kl_over_the_batch(shape):
    moments = torch.randn(shape).requires_grad_()
    z, log = ldm.DiagonalGaussianRegularizer()(moments)
    mean, logvar = moments.detach().double().requires_grad_().chunk(2, 1)
    expected = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
    torch.testing.assert_close(log["kl_loss"].double(), expected, rtol=1e-6, atol=0)
    eps = ((z.double() - mean) / torch.exp(0.5 * logvar)).detach()
    assert abs(eps.mean()) < 0.3 and 0.7 < eps.std() < 1.3
    (gradient,) = torch.autograd.grad(log["kl_loss"], moments)
    scaled = torch.cat((mean, 0.5 * torch.expm1(logvar)), 1) / shape[0]
    torch.testing.assert_close(gradient.double(), scaled, rtol=1e-5, atol=1e-7)


def test_the_regularizer_without_sampling_returns_the_mean():
    moments = torch.randn(3, 8, 5, 6)
    regularizer = ldm.DiagonalGaussianRegularizer(sample=False)
    z, log = regularizer(moments)
    assert torch.equal(z, moments[:, :4])
    torch.testing.assert_close(
        log["kl_loss"], ldm.DiagonalGaussianRegularizer()(moments)[1]["kl_loss"]
    )
    assert list(regularizer.get_trainable_parameters()) == []


def test_a_named_posterior_class_is_replaced_and_restored():
    cls = fresh_class()
    before = dict(vars(cls))
    parameters, other, x = (*torch.randn(2, 3, 8, 5, 6), torch.randn(3, 4, 5, 6))
    expected = cls(parameters).kl(cls(other)), cls(parameters).kl(), cls(parameters).nll(x)
    torch.manual_seed(1)
    sample = cls(parameters).sample()
    with ldm.applied(cls, noise="upstream"):
        posterior = cls(parameters)
        assert "mean" not in posterior.__dict__
        actual = posterior.kl(cls(other)), posterior.kl(), posterior.nll(x)
        torch.manual_seed(1)
        assert torch.equal(posterior.sample(), sample)
        with ldm.applied(cls):
            torch.manual_seed(1)
            assert not torch.equal(posterior.sample(), sample)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)
    assert all(vars(cls)[name] is before[name] for name in before)
    assert vars(cls).keys() == before.keys()


def test_two_classes_have_options_of_their_own():
    first, second = fresh_class(), fresh_class()
    parameters = torch.randn(2, 8, 3, 4, 4)
    ldm.apply(first)
    ldm.apply(second, compat=True)
    assert first(parameters).kl().shape == (2,) and second(parameters).kl().shape == (2, 4)
    ldm.undo()
    assert first(parameters).kl().shape == (2, 4)


def test_a_class_of_other_methods_is_refused():
    cls = fresh_class()
    cls.sample = lambda self, generator: None
    with pytest.raises(RuntimeError, match=r"sample must take \(self\), got \(self, generator\)"):
        ldm.apply(cls)
    with pytest.raises(TypeError, match="name the class to replace"):
        ldm.apply()
    with pytest.raises(TypeError, match="expected classes, got str"):
        ldm.apply("ldm.modules.distributions")
