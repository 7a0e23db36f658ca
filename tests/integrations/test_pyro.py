"""Pyro: TraceMeanField_ELBO on the registered KLs, and FusedNormal in models and guides."""

import pytest
import torch
from torch.distributions import kl_divergence

pyro = pytest.importorskip("pyro", reason="the peer pyro-ppl is not installed")
from pyro import distributions as dist  # noqa: E402
from pyro.infer import JitTraceMeanField_ELBO, TraceMeanField_ELBO  # noqa: E402

from fused_elbo.integrations import pyro as fused_pyro  # noqa: E402

DATA = torch.tensor([[-0.5, 2.0, 0.3], [1.0, -1.0, 0.0]])


def gradients(elbo, normal):
    """The mean-field gradients of a conjugate model, which does not depend on the samples."""
    pyro.clear_param_store()

    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))

    def guide():
        loc = pyro.param("loc", DATA.clone())
        scale = pyro.param("scale", torch.full((2, 3), 0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", 2):
            pyro.sample("z", normal(loc, scale).to_event(1))

    loss = elbo.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    return loss, [store.get_state()["params"][name].grad.clone() for name in ("loc", "scale")]


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, JitTraceMeanField_ELBO])
@pytest.mark.parametrize("normal", [dist.Normal, fused_pyro.FusedNormal])
def test_mean_field_losses_and_gradients_are_those_of_pyro(elbo, normal):
    expected_loss, expected = gradients(elbo(), dist.Normal)
    with fused_pyro.applied():
        loss, actual = gradients(elbo(), normal)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_trace_mean_field_elbo_runs_the_kernel(monkeypatch):
    from fused_elbo.integrations import distributions

    calls = []
    kernel = distributions.gaussian_kl

    def counted(*args, **options):
        calls.append(options["reduction"])
        return kernel(*args, **options)

    monkeypatch.setattr(distributions, "gaussian_kl", counted)
    gradients(TraceMeanField_ELBO(), dist.Normal)
    assert not calls
    with fused_pyro.applied():
        gradients(TraceMeanField_ELBO(), dist.Normal)
    assert calls == ["none"]


def test_independents_of_different_event_dimensions_are_left_to_pyro():
    p = dist.Normal(torch.randn(2, 3), torch.ones(2, 3))
    q = dist.Normal(torch.zeros(2, 3), torch.ones(2, 3))
    expected = kl_divergence(p.to_event(2), q.to_event(1).to_event(1))
    delta = dist.Delta(torch.zeros(2, 3))
    with fused_pyro.applied():
        torch.testing.assert_close(kl_divergence(p.to_event(2), q.to_event(2)), expected)
        torch.testing.assert_close(kl_divergence(delta, q), -q.log_prob(torch.zeros(2, 3)))


def test_fused_normals_are_pyro_distributions():
    normal = fused_pyro.FusedNormal(torch.zeros(3), torch.ones(3))
    assert isinstance(normal, dist.torch_distribution.TorchDistributionMixin)
    assert isinstance(normal.expand((2, 3)), fused_pyro.FusedNormal)
    assert normal.mask(torch.tensor([True, False, True])).to_event(1).event_shape == (3,)
    observed = pyro.sample("x", normal.to_event(1), obs=torch.zeros(3))
    assert torch.equal(observed, torch.zeros(3))
