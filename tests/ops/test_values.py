"""Values: every operation agrees with float64, to the figures that the design promises."""

import math

import mpmath
import pytest
import torch

from fused_elbo import (
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops import truth
from tests.ops.support import NORMALS, RELATIVE, assert_within, leaf

FULL = (torch.float32, torch.float64)
KEY = NoiseKey(seed=-(2**40) - 7, stream=3)

# Rows that start at every lane, vector loops with and without a tail, one element, many rows, long
# rows.
SHAPES = [(7,), (1, 1), (5, 3), (33, 20), (4, 257), (2, 3, 5, 7), (3, 4, 16, 16), (2, 3, 4, 2, 3)]
LARGE = [(300, 128), (3, 16411)]
PRIORS = ("standard", "full", "one row", "one number")


def shapes(interpreted, large=True):
    return SHAPES + (LARGE if large and not interpreted else [])


def prior(form, shape, dtype, device):
    if form == "standard":
        return None, None
    sizes = {"full": shape, "one row": shape[1:], "one number": ()}[form]
    return leaf(*sizes, dtype=dtype, device=device), leaf(*sizes, dtype=dtype, device=device)


def z_bound(mean, logvar, eps, dtype):
    """What an error of the normals does to z, plus the rounding of the rest."""
    std = torch.exp(logvar / 2)
    return RELATIVE[dtype] * (mean.abs() + std * (1 + eps.abs()))


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_z_is_the_same_with_and_without_a_kl(dtype, device):
    for shape in [(5, 3), (4, 257)]:
        mean, logvar = (leaf(*shape, dtype=dtype, device=device, scale=2) for _ in range(2))
        z, _ = reparameterize_kl(mean, logvar, key=KEY)
        assert torch.equal(reparameterize(mean, logvar, key=KEY), z)


@pytest.mark.parametrize("num_samples", [None, 1, 3])
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_z_is_mean_plus_std_times_the_noise_of_the_contract(
    dtype, num_samples, device, interpreted
):
    for shape in shapes(interpreted):
        mean, logvar = (leaf(*shape, dtype=dtype, device=device, scale=2) for _ in range(2))
        z = reparameterize(mean, logvar, key=KEY, num_samples=num_samples)
        eps = truth.normals(shape, KEY.seed, KEY.stream, num_samples=num_samples, dtype=dtype)
        mean64, logvar64 = truth.double(mean, logvar)
        expected = truth.sample(mean64, logvar64, eps)
        assert z.dtype == dtype
        assert_within(z, expected, z_bound(mean64, logvar64, eps, dtype))


@pytest.mark.parametrize("form", PRIORS)
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_both_outputs_of_reparameterize_kl_agree_with_float64(dtype, form, device, interpreted):
    for shape in shapes(interpreted, large=form in ("standard", "full")):
        mean, logvar = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        p = prior(form, shape, dtype, device)
        z, kl = reparameterize_kl(mean, logvar, *p, key=KEY)
        mean64, logvar64, *p64 = truth.double(mean, logvar, *p)
        eps = truth.normals(shape, KEY.seed, KEY.stream, dtype=dtype)
        assert_within(z, truth.sample(mean64, logvar64, eps), z_bound(mean64, logvar64, eps, dtype))
        expected = truth.kl(mean64, logvar64, *p64)
        # With a prior, logvar - prior_logvar and mean - prior_mean are rounded before phi and the
        # square see them: a relative error of 2**-24 each in an argument moves the term by at most
        # a few times that of its scale.
        scale = (
            expected
            if form == "standard"
            else truth.kl(mean64, logvar64, *p64, reduction="sample") + 1
        )
        assert_within(kl, expected, RELATIVE[dtype] * scale)


@pytest.mark.parametrize("form", PRIORS)
def test_gaussian_kl_is_the_kl_of_reparameterize_kl(form, device):
    mean, logvar = (leaf(6, 5, 4, device=device) for _ in range(2))
    p = prior(form, (6, 5, 4), torch.float32, device)
    assert torch.equal(
        gaussian_kl(mean, logvar, *p), reparameterize_kl(mean, logvar, *p, key=KEY)[1]
    )


def test_reparameterize_is_the_z_of_reparameterize_kl(device):
    """To a rounding: with the KL beside it, a kernel may take the exponential another way."""
    mean, logvar = (leaf(6, 5, 4, device=device) for _ in range(2))
    z = reparameterize_kl(mean, logvar, key=KEY)[0]
    torch.testing.assert_close(reparameterize(mean, logvar, key=KEY), z, rtol=1e-6, atol=1e-6)


def test_one_parameter_of_a_prior_alone_leaves_the_other_zero(device):
    mean, logvar, p = (leaf(6, 5, device=device) for _ in range(3))
    zero = torch.zeros(6, 5, device=device)
    assert torch.equal(gaussian_kl(mean, logvar, prior_mean=p), gaussian_kl(mean, logvar, p, zero))
    assert torch.equal(
        gaussian_kl(mean, logvar, prior_logvar=p), gaussian_kl(mean, logvar, zero, p)
    )


def test_kl_and_log_likelihood_of_65536_elements_are_within_1e_6(device):
    mean, logvar, x = (leaf(2, 65536, device=device) for _ in range(3))
    with torch.no_grad():
        logvar[1] *= 1e-3  # near the standard normal, where the usual formula loses every digit
        mean[1] *= 1e-3
    mean64, logvar64, x64 = truth.double(mean, logvar, x)
    expected = truth.kl(mean64, logvar64)
    assert_within(gaussian_kl(mean, logvar), expected, 1e-6 * expected)
    expected = truth.log_likelihood(x64, mean64, logvar64)
    assert_within(gaussian_log_likelihood(x, mean, logvar), expected, 1e-6 * expected.abs())


def arguments_of_phi(dtype, count):
    magnitude = torch.logspace(-8, math.log10(80), count, dtype=torch.float64)
    return torch.cat((magnitude, -magnitude)).to(dtype)


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_phi_is_within_4_ulp_of_50_digits(dtype, device, interpreted):
    logvar = arguments_of_phi(dtype, 512 if interpreted else 4000)
    mean = torch.zeros_like(logvar)
    elementwise = 2 * gaussian_kl(mean.to(device), logvar.to(device), reduction="none").cpu()
    exact = truth.exact_phi(logvar)
    epsilon = mpmath.mpf(torch.finfo(dtype).eps)
    for x, value, phi in zip(logvar.tolist(), elementwise.tolist(), exact):
        ulp = epsilon * mpmath.mpf(2) ** mpmath.floor(mpmath.log(phi, 2))
        assert abs(value - phi) <= 4 * ulp, f"phi({x}) = {value}, not {phi}"


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_kl_is_never_negative_and_zero_where_the_two_gaussians_are_equal(
    dtype, device, interpreted
):
    logvar = torch.cat(
        (
            arguments_of_phi(dtype, 1000 if interpreted else 50_000),
            torch.randn(1000).to(dtype) * 1e-3,
        )
    )
    logvar = torch.cat(
        (logvar, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-42, -1e-42], dtype=dtype))
    ).to(device)
    zero = torch.zeros_like(logvar)
    assert (gaussian_kl(zero, logvar, reduction="none") >= 0).all()
    mean = torch.randn_like(logvar)
    assert (gaussian_kl(mean, logvar, mean, zero, reduction="none") >= 0).all()
    assert (gaussian_kl(mean, logvar, mean, logvar, reduction="none") == 0).all()


@pytest.mark.parametrize("num_samples", [2, 5])
def test_kl_does_not_depend_on_the_number_of_samples(num_samples, device):
    mean, logvar = (leaf(6, 5, device=device) for _ in range(2))
    _, one = reparameterize_kl(mean, logvar, key=KEY)
    z, several = reparameterize_kl(mean, logvar, key=KEY, num_samples=num_samples)
    assert z.shape == (num_samples, 6, 5)
    assert torch.equal(one, several)


# Where the logarithm is hardest: words that give u = 1 exactly (radius 0; an approximate logarithm
# may turn positive there) and words near 0 (the largest radii). Found by a search over the counters
# of seed 0: counter, word index.
EXTREME_WORDS = {
    "u is 1, word 0": (38471471, 0),
    "u is 1, word 2": (24962728, 2),
    "largest radius, word 0": (48643752, 0),
    "largest radius, word 2": (66601073, 2),
}


@pytest.mark.parametrize("case", EXTREME_WORDS)
def test_normals_hold_their_bound_at_the_ends_of_the_unit_interval(case, device):
    counter, index = EXTREME_WORDS[case]
    word = int(truth.words(0, counter, 1)[0, index])
    assert word >= 2**32 - 128 if "u is 1" in case else word < 128
    for dtype in FULL:
        zeros = torch.zeros(1, 4, dtype=dtype, device=device)
        eps = reparameterize(zeros, zeros, key=NoiseKey(0, row_offset=counter))
        expected = truth.normals((1, 4), 0, row_offset=counter, dtype=dtype)
        assert_within(eps, expected, NORMALS[dtype] * (1 + expected.abs()))
        if "u is 1" in case and dtype == torch.float32:
            assert (eps[0, index : index + 2] == 0).all()


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_normals_agree_with_float64(dtype, device, interpreted):
    shape = (8, 256) if interpreted else (100, 5003)
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    expected = truth.normals(shape, 12345, dtype=dtype)
    eps = reparameterize(zeros, zeros, key=NoiseKey(12345))
    assert_within(eps, expected, NORMALS[dtype] * (1 + expected.abs()))


def variances(shape):
    """Every form that the log-variance of a likelihood takes for ``[B, C, H, W]``, as shapes."""
    _, c, h, w = shape
    return {
        "one learned variance": (),
        "one number in one dimension": (1,),
        "per channel": (c, 1, 1),
        "per pixel": (h, w),
        "per column": (w,),
        "per row": (h, 1),
        "per element": (c, h, w),
        "per sample": (shape[0], 1, 1, 1),
        "per sample and channel": (shape[0], c, 1, 1),
        "per sample and pixel": (shape[0], 1, h, w),
        "full": shape,
    }


IMAGES = (5, 3, 6, 7)


@pytest.mark.parametrize("form", variances(IMAGES))
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_log_likelihood_in_every_form_of_the_variance_agrees_with_float64(
    dtype, form, device, interpreted
):
    for shape in [IMAGES] if interpreted else [IMAGES, (2, 3, 32, 33)]:
        x, mean = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        logvar = leaf(*variances(shape)[form], dtype=dtype, device=device)
        x64, mean64, logvar64 = truth.double(x, mean, logvar)
        expected = truth.log_likelihood(x64, mean64, logvar64)
        # The sum has terms of both signs: the bound is relative to the sum of their magnitudes.
        scale = 0.5 * ((x64 - mean64) ** 2 * torch.exp(-logvar64) + logvar64.abs() + 2).flatten(
            1
        ).sum(1)
        assert_within(gaussian_log_likelihood(x, mean, logvar), expected, RELATIVE[dtype] * scale)


@pytest.mark.parametrize("logvar", [None, 0.0, -1.25, 2, 30.0])
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_log_likelihood_with_a_number_for_the_variance_agrees_with_float64(
    dtype, logvar, device, interpreted
):
    for shape in shapes(interpreted):
        x, mean = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        expected = truth.log_likelihood(*truth.double(x, mean), logvar or 0.0)
        ll = gaussian_log_likelihood(x, mean, logvar)
        assert_within(ll, expected, RELATIVE[dtype] * (expected.abs() + 1))


@pytest.mark.parametrize("which", ["x", "mean", "both"])
def test_log_likelihood_broadcasts_over_a_leading_sample_dimension(which, device):
    full, plain = (4, 5, 3, 2), (5, 3, 2)
    x = leaf(*(plain if which == "mean" else full), device=device)
    mean = leaf(*(plain if which == "x" else full), device=device)
    for logvar in (None, leaf(3, 1, device=device), leaf(*plain, device=device)):
        x64, mean64, logvar64 = truth.double(x, mean, logvar)
        value = 0.0 if logvar is None else logvar64
        if which == "both":  # equal shapes: dimension 0 is the batch, as everywhere
            expected = truth.log_likelihood(x64, mean64, value)
        else:
            expected = truth.log_likelihood(x64, mean64, value, batch_dims=2)
            assert expected.shape == (4, 5)
        assert_within(
            gaussian_log_likelihood(x, mean, logvar), expected, 1e-6 * (expected.abs() + 10)
        )


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_elbo_loss_and_its_two_parts_agree_with_float64(dtype, device, interpreted):
    for images, latent in [((5, 3, 6, 7), (5, 4)), ((3, 2, 9), (3, 2, 5, 3)), ((4,), (4,))]:
        recon_x, x = (leaf(*images, dtype=dtype, device=device) for _ in range(2))
        mean, logvar = (leaf(*latent, dtype=dtype, device=device) for _ in range(2))
        out = elbo_loss(recon_x, x, mean, logvar, recon_logvar=-0.5, beta=4.0)
        recon64, x64, mean64, logvar64 = truth.double(recon_x, x, mean, logvar)
        ll = truth.log_likelihood(x64, recon64, -0.5)
        kl = truth.kl(mean64, logvar64)
        assert_within(out.log_likelihood, ll, RELATIVE[dtype] * (ll.abs() + 10))
        assert_within(out.kl, kl, RELATIVE[dtype] * kl)
        assert_within(
            out.loss,
            (4 * kl - ll).mean(),
            RELATIVE[dtype] * ((4 * kl).mean() + ll.abs().mean() + 10),
        )
