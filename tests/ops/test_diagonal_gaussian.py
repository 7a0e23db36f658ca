"""DiagonalGaussian: moments read in place, clamped inside, one gradient in their own layout."""

import copy

import pytest
import torch

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops import truth
from tests.ops.support import (
    DTYPES,
    LAYOUTS,
    RELATIVE,
    assert_rounded,
    assert_within,
    laid_out,
    leaf,
)

KEY = NoiseKey(seed=6, row_offset=1)


def parts(moments, dim=1, clamp=(-30.0, 20.0)):
    """mean and logvar in float64, differentiable down to the float64 copy of the moments."""
    (moments64,) = truth.double(moments)
    mean, logvar = moments64.chunk(2, dim)
    return moments64, mean, logvar.clamp(*clamp) if clamp else logvar


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_moments_in_any_layout_and_dimension_agree_with_float64(dim, layout, device):
    moments = laid_out(leaf(3, 4, 6, 8, device=device, scale=3), layout)
    z, kl = DiagonalGaussian.from_moments(moments, dim, clamp=(-2.0, 3.0)).sample_kl(key=KEY)
    upstream = torch.randn_like(z), torch.randn_like(kl)
    (grad,) = torch.autograd.grad((z, kl), moments, upstream)

    moments64, mean, logvar = parts(moments, dim, (-2.0, 3.0))
    eps = truth.normals(mean.shape, KEY.seed, row_offset=KEY.row_offset)
    expected = truth.sample(mean, logvar, eps), truth.kl(mean, logvar)
    assert_within(z, expected[0], 1e-6 * (mean.abs() + torch.exp(logvar / 2) * (1 + eps.abs())))
    assert_within(kl, expected[1], 1e-6 * expected[1])
    (grad64,) = torch.autograd.grad(expected, moments64, [u.cpu().double() for u in upstream])
    assert_within(grad, grad64, 1e-5 * (grad64.abs() + 1))


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_every_dtype_agree_with_float64(dtype, num_samples, device, interpreted):
    moments = leaf(3, 8, 5, dtype=dtype, device=device)
    z, kl = DiagonalGaussian.from_moments(moments).sample_kl(num_samples, key=KEY)
    _, mean, logvar = parts(moments)
    eps = truth.normals(mean.shape, KEY.seed, 0, KEY.row_offset, num_samples, dtype)
    bound = RELATIVE[dtype] * (mean.abs() + torch.exp(logvar / 2) * (1 + eps.abs()))
    if dtype in (torch.bfloat16, torch.float16):
        assert_rounded(
            z, truth.sample(mean, logvar, eps), bound, interpreted and dtype == torch.bfloat16
        )
    else:
        assert_within(z, truth.sample(mean, logvar, eps), bound)
    expected = truth.kl(mean, logvar)
    assert_within(kl, expected, RELATIVE[dtype] * expected)


def test_the_gradient_is_zero_outside_the_clamp_and_kept_at_its_edges(device):
    """As torch.clamp: the edges belong to the inside."""
    logvar = torch.tensor([-31.0, -30.0, -29.0, 0.5, 19.0, 20.0, 21.0], device=device)
    moments = torch.stack((torch.zeros_like(logvar), logvar), 1).requires_grad_()
    z, kl = DiagonalGaussian.from_moments(moments).sample_kl(key=KEY)
    (grad,) = torch.autograd.grad((z, kl), moments, (torch.ones_like(z), torch.ones_like(kl)))
    assert (grad[:, 1] == 0).tolist() == [True, False, False, False, False, False, True]
    moments64, mean, clamped = parts(moments)
    eps = truth.normals((7, 1), KEY.seed, row_offset=KEY.row_offset)
    total = truth.sample(mean, clamped, eps).sum() + truth.kl(mean, clamped).sum()
    (expected,) = torch.autograd.grad(total, moments64)
    assert_within(grad, expected, 1e-6 * (expected.abs() + torch.exp(clamped / 2) * 3 + 1))


def test_without_a_clamp_nothing_is_clamped(device):
    moments = torch.tensor([[0.0, 25.0], [0.0, -40.0]], device=device)
    kl = DiagonalGaussian.from_moments(moments, clamp=None).kl()
    expected = truth.kl(torch.zeros(2, 1).double(), torch.tensor([[25.0], [-40.0]]).double())
    assert_within(kl, expected, 1e-6 * expected)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed image"])
def test_moments_get_one_gradient_in_their_own_layout(layout, device):
    moments = laid_out(leaf(3, 4, 6, 8, device=device), layout)
    z, kl = DiagonalGaussian.from_moments(moments).sample_kl(key=KEY)
    edges = z.grad_fn.next_functions
    assert sum(node is not None for node, _ in edges) == 1
    (grad,) = torch.autograd.grad((z.sum(), kl.sum()), moments)
    assert grad.shape == moments.shape
    assert grad.stride() == moments.stride()


def test_methods_are_the_functions(device):
    mean, logvar, x = (leaf(4, 3, 5, device=device) for _ in range(3))
    q = DiagonalGaussian(mean, logvar)
    assert torch.equal(q.rsample(key=KEY), reparameterize(mean, logvar, key=KEY))
    assert torch.equal(q.rsample(2, key=KEY), reparameterize(mean, logvar, key=KEY, num_samples=2))
    for reduction in ("none", "sample", "sum", "batchmean"):
        z, kl = q.sample_kl(key=KEY, reduction=reduction)
        expected = reparameterize_kl(mean, logvar, key=KEY, reduction=reduction)
        assert torch.equal(z, expected[0])
        assert torch.equal(kl, expected[1])
        assert torch.equal(
            q.kl(reduction=reduction), gaussian_kl(mean, logvar, reduction=reduction)
        )
        assert torch.equal(
            q.log_prob(x, reduction), gaussian_log_likelihood(x, mean, logvar, reduction=reduction)
        )


def test_log_prob_of_several_samples(device):
    q = DiagonalGaussian(leaf(4, 3, device=device), leaf(4, 3, device=device))
    z = q.rsample(5, key=KEY)
    log_prob = q.log_prob(z)
    expected = torch.distributions.Normal(q.mean, q.std).log_prob(z).sum(-1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)


def test_kl_between_two_gaussians_and_its_four_gradients(device):
    a, b = (leaf(4, 6, 5, device=device) for _ in range(2))
    q, p = DiagonalGaussian.from_moments(a), DiagonalGaussian.from_moments(b)
    kl = q.kl(p)
    grads = torch.autograd.grad(kl.sum(), (a, b))
    a64, mean, logvar = parts(a)
    b64, prior_mean, prior_logvar = parts(b)
    expected = truth.kl(mean, logvar, prior_mean, prior_logvar)
    assert_within(kl, expected, 1e-6 * (expected + 10))
    for grad, e in zip(grads, torch.autograd.grad(expected.sum(), (a64, b64))):
        assert_within(grad, e, 1e-5 * (e.abs() + 10))
    assert (q.kl(q) == 0).all()


def test_another_gaussian_is_clamped_by_its_own_clamp(device):
    moments = torch.tensor([[0.0, 5.0]], device=device)
    narrow = DiagonalGaussian.from_moments(moments, clamp=(-1.0, 1.0))
    wide = DiagonalGaussian.from_moments(moments)
    expected = truth.kl(
        torch.zeros(1, 1).double(), torch.tensor([[5.0]]).double(), 0.0, torch.tensor(1.0).double()
    )
    assert_within(wide.kl(narrow), expected, 1e-6 * expected)
    assert wide.kl(DiagonalGaussian(narrow.mean, narrow.logvar)) == wide.kl(narrow)


def test_the_kl_of_a_video_latent_is_summed_over_all_but_the_batch(device):
    moments = leaf(2, 8, 3, 4, 4, device=device)
    _, mean, logvar = parts(moments)
    expected = truth.kl(mean, logvar)
    kl = DiagonalGaussian.from_moments(moments).kl()
    assert kl.shape == (2,)
    assert_within(kl, expected, 1e-6 * expected)


def test_properties_are_those_of_the_clamped_distribution(device):
    moments = torch.tensor([[0.5, -1.5, 25.0, -40.0]], device=device)
    q = DiagonalGaussian.from_moments(moments)
    assert q.mean.tolist() == q.mode().tolist() == [[0.5, -1.5]]
    assert q.logvar.tolist() == [[20.0, -30.0]]
    torch.testing.assert_close(q.std, torch.exp(0.5 * q.logvar))
    torch.testing.assert_close(q.var, torch.exp(q.logvar))
    assert q.mean.untyped_storage().data_ptr() == moments.untyped_storage().data_ptr()  # a view
    assert (
        repr(q) == f"DiagonalGaussian(shape=(1, 2), dtype=torch.float32, device='{moments.device}')"
    )
    other = copy.deepcopy(q)
    assert torch.equal(other.rsample(key=KEY), q.rsample(key=KEY))
