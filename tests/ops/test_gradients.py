"""Gradients: those of float64 formulas; and to second order, those of finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

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
from tests.ops.support import RELATIVE, assert_within, leaf

FULL = (torch.float32, torch.float64)
KEY = NoiseKey(seed=11, stream=2, row_offset=5)
SHAPES = [(7,), (5, 3), (2, 3, 5, 7), (4, 257)]
LARGE = [(300, 128), (2, 16411)]


def gradients(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream)


def assert_gradients(actual, expected, bounds):
    for a, e, bound in zip(actual, expected, bounds):
        assert_within(a, e, bound)


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("with_prior", [False, True], ids=["standard prior", "prior"])
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_gradients_of_reparameterize_kl_agree_with_float64(
    dtype, with_prior, num_samples, device, interpreted
):
    for shape in SHAPES if interpreted else SHAPES + LARGE:
        inputs = [leaf(*shape, dtype=dtype, device=device) for _ in range(4 if with_prior else 2)]
        z, kl = reparameterize_kl(*inputs, key=KEY, num_samples=num_samples)
        grad_z, grad_kl = torch.randn_like(z), torch.randn_like(kl)
        actual = gradients((z, kl), inputs, (grad_z, grad_kl))

        inputs64 = truth.double(*inputs)
        mean, logvar, *prior = inputs64
        eps = truth.normals(shape, KEY.seed, KEY.stream, KEY.row_offset, num_samples, dtype)
        upstream = [grad_z.cpu().double(), grad_kl.cpu().double()]
        outputs = truth.sample(mean, logvar, eps), truth.kl(mean, logvar, *prior)
        expected = gradients(outputs, inputs64, upstream)

        # Each gradient is a sum of terms: the bound is relative to the sum of their magnitudes.
        prior_mean, prior_logvar = prior or (torch.zeros(()).double(), torch.zeros(()).double())
        of_z, of_noise = upstream[0].abs(), (upstream[0] * (1 + eps.abs())).abs()
        if num_samples:
            of_z, of_noise = of_z.sum(0), of_noise.sum(0)
        of_kl = upstream[1].abs().reshape(-1, *(1,) * (mean.dim() - 1))
        pull = (mean.abs() + prior_mean.abs()) * torch.exp(-prior_logvar)
        spread = torch.exp(logvar - prior_logvar) + 1
        square = (mean.abs() + prior_mean.abs()) * pull
        bounds = (
            of_z + of_kl * pull,
            of_noise * torch.exp(logvar / 2) + of_kl * spread,
            of_kl * pull,
            of_kl * (spread + square),
        )
        assert_gradients(actual, expected, [RELATIVE[dtype] * bound for bound in bounds])


@pytest.mark.parametrize("op", [reparameterize, gaussian_kl])
def test_the_two_halves_have_the_gradients_of_the_whole(op, device):
    inputs = [leaf(5, 3, 4, device=device) for _ in range(2)]
    z, kl = reparameterize_kl(*inputs, key=KEY)
    half, whole = (op(*inputs, key=KEY), z) if op is reparameterize else (op(*inputs), kl)
    upstream = torch.randn_like(whole)
    for a, b in zip(gradients(half, inputs, upstream), gradients(whole, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unused", ["z", "kl"])
def test_an_output_without_an_upstream_gradient_adds_nothing(unused, device):
    inputs = [leaf(5, 3, device=device) for _ in range(2)]
    z, kl = reparameterize_kl(*inputs, key=KEY)
    used, zeroed = (kl, z) if unused == "z" else (z, kl)
    upstream = torch.randn_like(used)
    alone = gradients(used, inputs, upstream)
    z, kl = reparameterize_kl(*inputs, key=KEY)
    used, zeroed = (kl, z) if unused == "z" else (z, kl)
    both = gradients((used, zeroed), inputs, (upstream, torch.zeros_like(zeroed)))
    for a, b in zip(alone, both):
        assert torch.equal(a, b)


@pytest.mark.parametrize("broadcast", [(), (4,), (3, 1), (1, 3, 4), (5, 1, 1), (1, 1, 4)], ids=str)
def test_gradients_of_a_broadcast_prior_are_summed_to_its_shape(broadcast, device):
    inputs = [leaf(5, 3, 4, device=device) for _ in range(2)]
    prior = [leaf(*broadcast, device=device) for _ in range(2)]
    kl = gaussian_kl(*inputs, *prior)
    upstream = torch.randn_like(kl)
    actual = gradients(kl, prior, upstream)
    *inputs64, prior_mean, prior_logvar = truth.double(*inputs, *prior)
    expected = gradients(
        truth.kl(*inputs64, prior_mean, prior_logvar),
        (prior_mean, prior_logvar),
        upstream.cpu().double(),
    )
    assert all(a.shape == broadcast for a in actual)
    # Up to 60 terms of magnitude up to about e^6.
    assert_gradients(actual, expected, [1e-6 * (60 + e.abs() * 30) for e in expected])


VARIANCES = {
    "unit": None,
    "number": 0.7,
    "one learned variance": (),
    "per channel": (3, 1, 1),
    "per pixel": (4, 5),
    "per column": (5,),
    "per element": (3, 4, 5),
    "per sample": (6, 1, 1, 1),
    "per sample and channel": (6, 3, 1, 1),
    "per sample and pixel": (6, 1, 4, 5),
    "full": (6, 3, 4, 5),
}


def variance(form, dtype, device):
    value = VARIANCES[form]
    return leaf(*value, dtype=dtype, device=device) if isinstance(value, tuple) else value


@pytest.mark.parametrize("form", VARIANCES)
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_gradients_of_the_log_likelihood_agree_with_float64(dtype, form, device):
    x, mean = (leaf(6, 3, 4, 5, dtype=dtype, device=device) for _ in range(2))
    logvar = variance(form, dtype, device)
    learned = isinstance(logvar, torch.Tensor)
    inputs = [x, mean, logvar] if learned else [x, mean]
    ll = gaussian_log_likelihood(x, mean, logvar)
    upstream = torch.randn_like(ll)
    actual = gradients(ll, inputs, upstream)

    inputs64 = truth.double(*inputs)
    logvar64 = inputs64[2] if learned else torch.tensor(logvar or 0.0, dtype=torch.float64)
    x64, mean64 = inputs64[:2]
    expected = gradients(
        truth.log_likelihood(x64, mean64, logvar64), inputs64, upstream.cpu().double()
    )
    coefficient = upstream.cpu().double().abs().reshape(6, 1, 1, 1)
    pull = (x64.abs() + mean64.abs()) * torch.exp(-logvar64)
    bounds = [coefficient * pull] * 2
    if learned:
        terms = coefficient * ((x64.abs() + mean64.abs()) * pull + 1)
        bounds.append(terms.sum_to_size(logvar64.shape))
    assert_gradients(actual, expected, [RELATIVE[dtype] * bound for bound in bounds])


@pytest.mark.parametrize("broadcast", ["x", "mean"])
@pytest.mark.parametrize("form", ["unit", "per channel", "full"])
def test_gradients_of_a_likelihood_over_samples_are_summed_over_them(form, broadcast, device):
    logvar = variance(form, torch.float32, device)
    x = leaf(*((6,) if broadcast == "x" else (2, 6)), 3, 4, 5, device=device)
    mean = leaf(*((6,) if broadcast == "mean" else (2, 6)), 3, 4, 5, device=device)
    inputs = [t for t in (x, mean, logvar) if t is not None]
    ll = gaussian_log_likelihood(x, mean, logvar)
    upstream = torch.randn_like(ll)
    actual = gradients(ll, inputs, upstream)
    x64, mean64, logvar64 = truth.double(x, mean, logvar)
    value = 0.0 if logvar is None else logvar64
    expected = gradients(
        truth.log_likelihood(x64, mean64, value, batch_dims=2),
        [t for t in (x64, mean64, logvar64) if t is not None],
        upstream.cpu().double(),
    )
    for a, t in zip(actual, inputs):
        assert a.shape == t.shape
    # 2 samples for x and mean, 2 * 6 * 20 terms for a channel's variance, each of magnitude up to
    # about 100.
    assert_gradients(actual, expected, [1e-6 * (e.abs() + 500) for e in expected])


@pytest.mark.parametrize("missing", ["x", "mean", "logvar"])
def test_an_argument_that_needs_no_gradient_gets_none_and_changes_no_other(missing, device):
    arguments = {name: leaf(4, 3, 2, device=device) for name in ("x", "mean", "logvar")}
    upstream = torch.randn(4, device=device)
    every = gradients(gaussian_log_likelihood(**arguments), list(arguments.values()), upstream)
    fixed = {name: t.detach() if name == missing else t for name, t in arguments.items()}
    wanted = [t for name, t in fixed.items() if name != missing]
    some = gradients(gaussian_log_likelihood(**fixed), wanted, upstream)
    for a, b in zip(some, (g for name, g in zip(arguments, every) if name != missing)):
        assert torch.equal(a, b)


# gradcheck and gradgradcheck in float64


def check(function, *inputs):
    """Both orders."""
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def doubles(*shapes, device, scale=0.7):
    return tuple(leaf(*shape, dtype=torch.float64, device=device, scale=scale) for shape in shapes)


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("reduction", ["none", "sample", "sum", "batchmean"])
def test_gradcheck_reparameterize_kl(reduction, num_samples, device):
    def function(mean, logvar):
        return reparameterize_kl(
            mean, logvar, key=KEY, num_samples=num_samples, reduction=reduction
        )

    check(function, *doubles((2, 3), (2, 3), device=device))


@pytest.mark.parametrize("prior_shape", [(2, 3), (3,), (2, 1), ()], ids=str)
def test_gradcheck_reparameterize_kl_with_a_prior(prior_shape, device):
    check(
        lambda *arguments: reparameterize_kl(*arguments, key=KEY),
        *doubles((2, 3), (2, 3), prior_shape, prior_shape, device=device),
    )


@pytest.mark.parametrize("which", ["prior_mean", "prior_logvar"])
def test_gradcheck_one_parameter_of_a_prior_alone(which, device):
    check(
        lambda mean, logvar, parameter: gaussian_kl(mean, logvar, **{which: parameter}),
        *doubles((2, 3), (2, 3), (3,), device=device),
    )


def test_gradcheck_reparameterize(device):
    check(
        lambda *arguments: reparameterize(*arguments, key=KEY),
        *doubles((2, 3), (2, 3), device=device),
    )


@pytest.mark.parametrize("reduction", ["none", "sample", "sum", "batchmean"])
def test_gradcheck_gaussian_kl(reduction, device):
    check(
        lambda *arguments: gaussian_kl(*arguments, reduction=reduction),
        *doubles((2, 3), (2, 3), (2, 3), (2, 3), device=device),
    )


@pytest.mark.parametrize("clamp", [None, (-1.0, 0.5)], ids=["no clamp", "clamp"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradcheck_moments(channels_last, clamp, device):
    moments = torch.linspace(-2.1, 1.7, 24, dtype=torch.float64, device=device).view(
        2, 6, 1, 2
    )  # none at an edge
    if channels_last:
        moments = moments.contiguous(memory_format=torch.channels_last)
    check(
        lambda m: DiagonalGaussian.from_moments(m, clamp=clamp).sample_kl(key=KEY),
        moments.requires_grad_(),
    )


def test_gradcheck_kl_between_two_gaussians_from_moments(device):
    check(
        lambda a, b: DiagonalGaussian.from_moments(a).kl(DiagonalGaussian.from_moments(b)),
        *doubles((2, 4), (2, 4), device=device),
    )


@pytest.mark.parametrize("form", [None, 0.3, (), (2, 1), (2,), (3, 1, 1), (3, 2, 2)], ids=str)
def test_gradcheck_log_likelihood_in_every_form_of_the_variance(form, device):
    x, mean = doubles((3, 2, 2), (3, 2, 2), device=device)
    if isinstance(form, tuple):
        check(gaussian_log_likelihood, x, mean, *doubles(form, device=device))
    else:
        check(lambda *arguments: gaussian_log_likelihood(*arguments, form), x, mean)


@pytest.mark.parametrize("reduction", ["none", "sample", "sum", "batchmean"])
def test_gradcheck_log_likelihood_over_samples(reduction, device):
    check(
        lambda *arguments: gaussian_log_likelihood(*arguments, reduction=reduction),
        *doubles((2, 2), (3, 2, 2), (2,), device=device),
    )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
@pytest.mark.parametrize("form", [None, (), (2,), (3, 1), (3, 2)], ids=str)
def test_gradcheck_elbo_loss(form, reduction, device):
    inputs = doubles((3, 2), (3, 2), (3, 2), (3, 2), device=device)
    variance = doubles(form, device=device) if form is not None else ()

    def loss(recon_x, x, mean, logvar, recon_logvar=None):
        return elbo_loss(
            recon_x, x, mean, logvar, recon_logvar=recon_logvar, beta=1.7, reduction=reduction
        ).loss

    check(loss, *inputs, *variance)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
def test_gradcheck_elbo_loss_of_a_given_kl(reduction, device):
    beta = torch.tensor(0.6, dtype=torch.float64, device=device)
    check(
        lambda recon_x, x, kl: elbo_loss(recon_x, x, kl=kl, beta=beta, reduction=reduction).loss,
        *doubles((3, 2), (3, 2), (3,), device=device),
    )


def test_first_gradients_are_the_same_with_and_without_create_graph(device):
    mean, logvar, prior_mean, prior_logvar, x = (leaf(6, 5, device=device) for _ in range(5))
    variance = leaf(5, device=device)

    def losses():
        z, kl = reparameterize_kl(mean, logvar, prior_mean, prior_logvar, key=KEY)
        yield z.square().sum() + kl.sum(), (mean, logvar, prior_mean, prior_logvar)
        yield gaussian_log_likelihood(x, mean, variance, reduction="sum"), (x, mean, variance)
        yield (
            elbo_loss(mean, x, prior_mean, logvar, recon_logvar=variance).loss,
            (mean, x, prior_mean, logvar, variance),
        )

    for (plain, inputs), (graphed, _) in zip(losses(), losses()):
        for a, b in zip(
            gradients(plain, inputs, None), torch.autograd.grad(graphed, inputs, create_graph=True)
        ):
            assert b.grad_fn is not None
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)


def test_a_gradient_penalty_trains(device):
    """Double backward in float32: with L = sum of z^2 / 2, d/dmean of |dL/dmean|^2 is 2 z."""
    mean, logvar = leaf(4, 3, device=device), torch.full((4, 3), math.log(2.0), device=device)
    z = reparameterize(mean, logvar, key=KEY)
    (grad,) = torch.autograd.grad(z.square().sum() / 2, mean, create_graph=True)
    (penalty,) = torch.autograd.grad(grad.square().sum(), mean)
    torch.testing.assert_close(penalty, 2 * z.detach())
