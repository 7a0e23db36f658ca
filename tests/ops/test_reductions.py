"""Reductions, and the upstream gradients that they are given."""

import pytest
import torch

from fused_elbo import NoiseKey, elbo_loss, gaussian_kl, gaussian_log_likelihood, reparameterize_kl
from tests.ops import truth
from tests.ops.support import assert_within, leaf

KEY = NoiseKey(seed=3)
SHAPE = (6, 3, 5)
REDUCTIONS = ("none", "sample", "sum", "batchmean")


def output_shape(reduction, batch_dims=1, shape=SHAPE):
    return {"none": shape, "sample": shape[:batch_dims]}.get(reduction, ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_of_the_kl_is_that_of_the_elements(reduction, device):
    mean, logvar = (leaf(*SHAPE, device=device) for _ in range(2))
    expected = truth.kl(*truth.double(mean, logvar), reduction=reduction)
    for kl in (
        gaussian_kl(mean, logvar, reduction=reduction),
        reparameterize_kl(mean, logvar, key=KEY, reduction=reduction)[1],
    ):
        assert kl.shape == output_shape(reduction)
        assert_within(kl, expected, 1e-6 * expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_of_the_log_likelihood_is_that_of_the_elements(reduction, device):
    x, mean = leaf(*SHAPE, device=device), leaf(4, *SHAPE, device=device)
    x64, mean64 = truth.double(x, mean)
    ll = gaussian_log_likelihood(x, mean[0], reduction=reduction)
    expected = truth.log_likelihood(x64, mean64[0], reduction=reduction)
    assert ll.shape == output_shape(reduction)
    assert_within(ll, expected, 1e-6 * expected.abs())
    ll = gaussian_log_likelihood(x, mean, reduction=reduction)  # batchmean: over samples and batch
    expected = truth.log_likelihood(x64, mean64, reduction=reduction, batch_dims=2)
    assert ll.shape == output_shape(reduction, 2, (4, *SHAPE))
    assert_within(ll, expected, 1e-6 * expected.abs())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_through_every_reduction_agree_with_float64(reduction, device):
    mean, logvar, x = (leaf(*SHAPE, device=device) for _ in range(3))
    mean64, logvar64, x64 = truth.double(mean, logvar, x)
    for value, value64, inputs, inputs64 in (
        (
            gaussian_kl(mean, logvar, reduction=reduction),
            truth.kl(mean64, logvar64, reduction=reduction),
            (mean, logvar),
            (mean64, logvar64),
        ),
        (
            gaussian_log_likelihood(x, mean, logvar, reduction=reduction),
            truth.log_likelihood(x64, mean64, logvar64, reduction=reduction),
            (x, mean, logvar),
            (x64, mean64, logvar64),
        ),
    ):
        upstream = torch.randn_like(value)
        actual = torch.autograd.grad(value, inputs, upstream)
        expected = torch.autograd.grad(value64, inputs64, upstream.cpu().double())
        for a, e in zip(actual, expected):
            assert_within(a, e, 2e-6 * (e.abs() + upstream.abs().max().item()))


def expanded(how, shape, device):
    """Upstream gradients as autograd really sends them: `sum()` sends one number expanded,
    `mean(0)` one row."""
    if how == "one number":
        return torch.tensor(1.5, device=device).expand(shape)
    if how == "one row":
        return torch.randn(shape[1:], device=device).expand(shape)
    if how == "transposed":
        return torch.randn(shape[::-1], device=device).permute(*range(len(shape) - 1, -1, -1))
    assert how == "every second"
    return torch.randn(*shape, 2, device=device)[..., 1]


@pytest.mark.parametrize("how", ["one number", "one row", "transposed", "every second"])
@pytest.mark.parametrize("reduction", ["none", "sample"])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_upstream_gradients_of_any_strides_give_the_gradients_of_dense_ones(
    num_samples, reduction, how, device
):
    mean, logvar, x = (leaf(*SHAPE, device=device) for _ in range(3))
    z, kl = reparameterize_kl(mean, logvar, key=KEY, num_samples=num_samples, reduction=reduction)
    ll = gaussian_log_likelihood(x, mean, logvar, reduction=reduction)
    outputs = (z, kl, ll)
    upstream = [expanded(how, t.shape, device) for t in outputs]
    assert not all(u.is_contiguous() for u in upstream)
    inputs = (mean, logvar, x)
    actual = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
    dense = torch.autograd.grad(outputs, inputs, [u.contiguous() for u in upstream])
    for a, b in zip(actual, dense):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
def test_every_reduction_of_the_elbo_loss(reduction, device):
    recon_x, x, mean, logvar = (leaf(*SHAPE, device=device) for _ in range(4))
    out = elbo_loss(recon_x, x, mean, logvar, beta=2.0, reduction=reduction)
    expected = truth.elbo(*truth.double(recon_x, x, mean, logvar), beta=2.0, reduction=reduction)
    assert out.loss.shape == output_shape(reduction)
    assert_within(out.loss, expected, 1e-6 * expected.abs())
    assert out.log_likelihood.shape == out.kl.shape == (6,)
    torch.testing.assert_close(
        out.loss, truth.reduce(2.0 * out.kl - out.log_likelihood, reduction), rtol=1e-6, atol=0
    )
