"""dtypes: half precision is rounded once, nats never, and mixed inputs are promoted."""

import itertools

import pytest
import torch

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops import truth
from tests.ops.support import DTYPES, assert_rounded, assert_within, leaf, nats_dtype

HALF = (torch.bfloat16, torch.float16)
MIXED = list(itertools.permutations((torch.float32, *HALF), 2))
KEY = NoiseKey(seed=5)
SHAPES = [(9, 7), (3, 4, 5, 5), (40, 130)]
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("dtype", HALF, **ids)
def test_z_is_rounded_once_from_its_float32_value(dtype, num_samples, device, interpreted):
    for shape in SHAPES:
        mean, logvar = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        z = reparameterize(mean, logvar, key=KEY, num_samples=num_samples)
        mean64, logvar64 = truth.double(mean, logvar)
        eps = truth.normals(shape, KEY.seed, num_samples=num_samples)
        bound = 1e-6 * (mean64.abs() + torch.exp(logvar64 / 2) * (1 + eps.abs()))
        assert z.dtype == dtype
        truncates = interpreted and dtype == torch.bfloat16
        assert_rounded(z, truth.sample(mean64, logvar64, eps), bound, truncates)


@pytest.mark.parametrize("dtype", HALF, **ids)
def test_gradients_are_rounded_once_from_their_float32_values(dtype, device, interpreted):
    for shape in SHAPES:
        inputs = [leaf(*shape, dtype=dtype, device=device) for _ in range(4)]
        z, kl = reparameterize_kl(*inputs, key=KEY)
        grad_z, grad_kl = torch.randn_like(z), torch.randn_like(kl)
        actual = torch.autograd.grad((z, kl), inputs, (grad_z, grad_kl))
        inputs64 = truth.double(*inputs)
        eps = truth.normals(shape, KEY.seed)
        outputs = truth.sample(*inputs64[:2], eps), truth.kl(*inputs64)
        expected = torch.autograd.grad(
            outputs, inputs64, (grad_z.cpu().double(), grad_kl.cpu().double())
        )
        mean, logvar, prior_mean, prior_logvar = (t.detach() for t in inputs64)
        g = grad_kl.cpu().double().abs().reshape(-1, *(1,) * (len(shape) - 1))
        of_z = grad_z.cpu().double().abs() * (1 + eps.abs()) * torch.exp(logvar / 2)
        pull = (mean.abs() + prior_mean.abs()) * torch.exp(-prior_logvar)
        spread = 1 + torch.exp(logvar - prior_logvar)
        square = (mean.abs() + prior_mean.abs()) * pull
        bounds = (
            grad_z.cpu().double().abs() + g * pull,
            of_z + g * spread,
            g * pull,
            g * (spread + square),
        )
        for a, e, bound in zip(actual, expected, bounds):
            assert a.dtype == dtype
            assert_rounded(a, e, 1e-6 * bound, truncates=interpreted and dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, **ids)
def test_likelihood_gradients_are_rounded_once(dtype, device, interpreted):
    x, mean, logvar = (leaf(5, 3, 6, dtype=dtype, device=device) for _ in range(3))
    ll = gaussian_log_likelihood(x, mean, logvar)
    upstream = torch.randn_like(ll)
    actual = torch.autograd.grad(ll, (x, mean, logvar), upstream)
    inputs64 = truth.double(x, mean, logvar)
    expected = torch.autograd.grad(
        truth.log_likelihood(*inputs64), inputs64, upstream.cpu().double()
    )
    x64, mean64, logvar64 = (t.detach() for t in inputs64)
    g = upstream.cpu().double().abs().reshape(-1, 1, 1)
    pull = (x64 - mean64).abs() * torch.exp(-logvar64)
    for a, e, bound in zip(
        actual, expected, (g * pull, g * pull, g * (pull * (x64 - mean64).abs() + 1))
    ):
        assert_rounded(a, e, 1e-6 * bound, truncates=interpreted and dtype == torch.bfloat16)


@pytest.mark.parametrize("reduction", ["none", "sample", "sum", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_nats_are_float32_or_float64_whatever_the_inputs(dtype, reduction, device):
    x, mean, logvar = (leaf(4, 3, dtype=dtype, device=device) for _ in range(3))
    nats = nats_dtype(dtype)
    assert reparameterize_kl(mean, logvar, reduction=reduction)[1].dtype == nats
    assert gaussian_kl(mean, logvar, reduction=reduction).dtype == nats
    assert gaussian_log_likelihood(x, mean, logvar, reduction=reduction).dtype == nats
    if reduction != "none":
        assert {t.dtype for t in elbo_loss(x, mean, mean, logvar, reduction=reduction)} == {nats}


@pytest.mark.parametrize("dtype", HALF, **ids)
def test_nats_of_half_precision_inputs_have_float32_accuracy(dtype, device):
    x, mean, logvar = (leaf(6, 500, dtype=dtype, device=device) for _ in range(3))
    x64, mean64, logvar64 = truth.double(x, mean, logvar)
    expected = truth.kl(mean64, logvar64)
    assert_within(gaussian_kl(mean, logvar), expected, 1e-6 * expected)
    expected = truth.log_likelihood(x64, mean64, logvar64)
    assert_within(gaussian_log_likelihood(x, mean, logvar), expected, 1e-6 * expected.abs())
    out = elbo_loss(x, mean, mean, logvar)
    expected = truth.elbo(x64, mean64, mean64, logvar64)
    assert_within(out.loss, expected, 1e-6 * expected)


def test_a_half_precision_kl_does_not_overflow(device):
    """exp(11) over 16 elements is beyond float16: the sum has to be float32."""
    logvar = torch.full((2, 16), 11.0, dtype=torch.float16, device=device)
    kl = gaussian_kl(torch.zeros_like(logvar), logvar)
    expected = truth.kl(torch.zeros(2, 16).double(), logvar.cpu().double())
    assert expected.min() > torch.finfo(torch.float16).max
    assert_within(kl, expected, 1e-6 * expected)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_mixed_dtypes_are_promoted_as_torch_does(dtypes, device):
    a, b = dtypes
    mean, logvar = leaf(4, 3, dtype=a, device=device), leaf(4, 3, dtype=b, device=device)
    common = torch.promote_types(a, b)
    z, kl = reparameterize_kl(mean, logvar, key=KEY)
    assert z.dtype == common
    assert torch.equal(z, reparameterize_kl(mean.to(common), logvar.to(common), key=KEY)[0])
    (z.sum() + kl.sum()).backward()
    assert mean.grad.dtype == a
    assert logvar.grad.dtype == b
    ll = gaussian_log_likelihood(mean, logvar)
    assert torch.equal(ll, gaussian_log_likelihood(mean.to(common), logvar.to(common)))
    prior = leaf(3, dtype=torch.float32, device=device)
    assert reparameterize_kl(mean, logvar, prior, prior)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, **ids)
def test_a_wider_variance_or_prior_is_not_narrowed(dtype, device):
    """A float32 parameter beside half-precision activations, as mixed-precision training has it."""
    x, mean = (leaf(4, 3, dtype=dtype, device=device) for _ in range(2))
    logvar = torch.tensor(0.1234567, device=device, requires_grad=True)
    ll = gaussian_log_likelihood(x, mean, logvar)
    x64, mean64, logvar64 = truth.double(x, mean, logvar)
    expected = truth.log_likelihood(x64, mean64, logvar64)
    assert_within(ll, expected, 1e-6 * (expected.abs() + 1))
    ll.sum().backward()
    assert logvar.grad.dtype == torch.float32
    expected.sum().backward()
    assert_within(logvar.grad, logvar64.grad, 1e-5)

    prior = DiagonalGaussian(logvar.detach().expand(4, 3), torch.zeros(4, 3, device=device))
    expected = truth.kl(x64, mean64, logvar64, torch.zeros(()).double())
    assert_within(DiagonalGaussian(x, mean).kl(prior), expected, 1e-6 * (expected + 1))
