"""elbo_loss: gradients made in the forward pass stay right however backward is called."""

import math

import pytest
import torch
import torch.nn.functional as F

from fused_elbo import (
    ELBOOutput,
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize_kl,
)
from tests.ops import truth
from tests.ops.support import assert_within, leaf

REDUCTIONS = ("batchmean", "sum", "sample")


def inputs(device, dtype=torch.float32):
    recon_x, x = (leaf(6, 3, 5, dtype=dtype, device=device) for _ in range(2))
    mean, logvar = (leaf(6, 4, dtype=dtype, device=device) for _ in range(2))
    return recon_x, x, mean, logvar


def float64_gradients(tensors, upstream, recon_logvar=0.0, beta=1.0, reduction="batchmean"):
    tensors64 = truth.double(*tensors)
    if isinstance(recon_logvar, torch.Tensor):
        (recon_logvar,) = truth.double(recon_logvar)
        wanted = [*tensors64, recon_logvar]
    else:
        wanted = tensors64
    loss = truth.elbo(*tensors64, recon_logvar=recon_logvar, beta=beta, reduction=reduction)
    return torch.autograd.grad(loss, wanted, upstream.detach().cpu().double())


def assert_gradients(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_within(a, e, 2e-6 * (e.abs() + e.abs().max()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", ["one", "negative", "huge", "tiny", "expanded"])
def test_any_upstream_gradient_gives_the_gradients_of_float64(upstream, reduction, device):
    tensors = inputs(device)
    loss = elbo_loss(*tensors, beta=0.3, reduction=reduction).loss
    scale = {"one": 1.0, "negative": -2.5, "huge": 65536.0, "tiny": 1e-4, "expanded": 3.0}[upstream]
    grad = torch.full_like(loss, scale)
    if upstream == "expanded":
        grad = torch.tensor(scale, device=device).expand(loss.shape)
    elif loss.dim():
        grad = grad * torch.arange(1.0, 7.0, device=device)
    actual = torch.autograd.grad(loss, tensors, grad)
    assert_gradients(actual, float64_gradients(tensors, grad, beta=0.3, reduction=reduction))


VARIANCES = {
    "number": -0.7,
    "one learned variance": (),
    "per channel": (3, 1),
    "per pixel": (5,),
    "per sample": (6, 1, 1),
    "full": (6, 3, 5),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", VARIANCES)
def test_gradients_in_every_form_of_the_variance(form, reduction, device):
    tensors, variance = inputs(device), VARIANCES[form]
    learned = isinstance(variance, tuple)
    if learned:
        variance = leaf(*variance, device=device)
    loss = elbo_loss(*tensors, recon_logvar=variance, beta=2.0, reduction=reduction).loss
    grad = torch.randn_like(loss)
    wanted = (*tensors, variance) if learned else tensors
    actual = torch.autograd.grad(loss, wanted, grad)
    assert_gradients(actual, float64_gradients(tensors, grad, variance, 2.0, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_backward_twice_accumulates_twice_the_gradient(scale, reduction, device):
    tensors = inputs(device)
    loss = elbo_loss(*tensors, reduction=reduction).loss
    grad = torch.full_like(loss, scale)
    loss.backward(grad, retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad.mul_(0.5)  # what an optimizer may do to .grad must not reach the graph
        t.grad.zero_()
    loss.backward(grad, retain_graph=True)
    for t, g in zip(tensors, once):
        assert torch.equal(t.grad, g)
    loss.backward(grad)
    for t, g in zip(tensors, once):
        assert torch.equal(t.grad, 2 * g)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_calls_of_grad_are_independent(reduction, device):
    tensors = inputs(device)
    loss = elbo_loss(*tensors, reduction=reduction).loss
    ones = torch.ones_like(loss)
    first = torch.autograd.grad(loss, tensors, ones, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(float("nan"))
    second = torch.autograd.grad(loss, tensors, 2 * ones, retain_graph=True)
    third = torch.autograd.grad(loss, tensors, ones)
    for a, b, c in zip(kept, second, third):
        assert torch.equal(b, 2 * a)
        assert torch.equal(c, a)


def test_a_scaled_loss_has_scaled_gradients_that_unscale_exactly(device):
    """What GradScaler does; powers of two scale without rounding."""
    tensors = inputs(device)
    plain = torch.autograd.grad(elbo_loss(*tensors).loss, tensors)
    scaled = torch.autograd.grad(elbo_loss(*tensors).loss * 65536.0, tensors)
    for a, b in zip(plain, scaled):
        assert torch.equal(b / 65536.0, a)


def test_half_precision_gradients_survive_through_a_loss_scale(device):
    """Gradients of a mean over many rows are below the smallest float16: divided by the batch size
    before they are scaled they would be gone."""
    recon_x, mean = (
        torch.full((512, 4), 1e-5, device=device).half().requires_grad_() for _ in range(2)
    )
    zero = torch.zeros_like(recon_x)
    scale = 65536.0
    loss = elbo_loss(recon_x, zero, mean, zero).loss * scale
    for grad in torch.autograd.grad(loss, (recon_x, mean)):
        expected = mean.detach().double().cpu() * scale / 512
        assert_within(grad, expected, 2.0**-10 * expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_of_x_is_minus_that_of_the_reconstruction(reduction, device):
    tensors = inputs(device)
    loss = elbo_loss(*tensors, recon_logvar=0.2, reduction=reduction).loss
    grad_recon, grad_x = torch.autograd.grad(loss, tensors[:2], torch.randn_like(loss))
    assert torch.equal(grad_x, -grad_recon)
    assert grad_recon.abs().min() > 0


@pytest.mark.parametrize("only", range(4), ids=["recon_x", "x", "mean", "logvar"])
def test_one_input_alone_may_want_a_gradient(only, device):
    tensors = inputs(device)
    expected = torch.autograd.grad(elbo_loss(*tensors, beta=3.0).loss, tensors)
    alone = [t.detach() for t in tensors]
    alone[only].requires_grad_()
    (grad,) = torch.autograd.grad(elbo_loss(*alone, beta=3.0).loss, alone[only])
    assert torch.equal(grad, expected[only])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", [0.0, 0.25, 4, -1.0])
def test_beta_as_a_tensor_is_beta_as_a_number(beta, reduction, device):
    tensors = inputs(device)
    number = elbo_loss(*tensors, beta=beta, reduction=reduction)
    on_device = torch.tensor(float(beta), device=device, requires_grad=True)
    tensor = elbo_loss(*tensors, beta=on_device, reduction=reduction)
    torch.testing.assert_close(number.loss, tensor.loss, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(number.loss)
    for a, b in zip(
        torch.autograd.grad(number.loss, tensors, upstream),
        torch.autograd.grad(tensor.loss, tensors, upstream),
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    expected = truth.elbo(*truth.double(*tensors), beta=beta, reduction=reduction)
    assert_within(number.loss, expected, 1e-6 * (expected.abs() + 20))


def test_beta_gets_no_gradient(device):
    beta = torch.tensor(0.5, device=device, requires_grad=True)
    loss = elbo_loss(*inputs(device), beta=beta).loss
    assert torch.autograd.grad(loss, beta, allow_unused=True) == (None,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_given_kl_stands_for_mean_and_logvar(reduction, device):
    recon_x, x, mean, logvar = inputs(device)
    whole = elbo_loss(recon_x, x, mean, logvar, beta=0.7, reduction=reduction)
    kl = gaussian_kl(mean, logvar)
    given = elbo_loss(recon_x, x, kl=kl, beta=0.7, reduction=reduction)
    for a, b in zip(whole, given):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    upstream = torch.randn_like(whole.loss)
    tensors = (recon_x, x, mean, logvar)
    for a, b in zip(
        torch.autograd.grad(whole.loss, tensors, upstream),
        torch.autograd.grad(given.loss, tensors, upstream),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_of_a_given_kl_is_beta(reduction, device):
    recon_x, x, *_ = inputs(device)
    kl = torch.rand(6, device=device, requires_grad=True)
    for beta in (0.7, torch.tensor(0.7, device=device)):
        loss = elbo_loss(recon_x, x, kl=kl, beta=beta, reduction=reduction).loss
        (grad,) = torch.autograd.grad(loss, kl, torch.full_like(loss, 2.0))
        torch.testing.assert_close(
            grad, torch.full_like(kl, 1.4 / (6 if reduction == "batchmean" else 1))
        )


def test_a_vae_step_is_the_textbook_step(device):
    """Sampling, decoding and loss in one graph, against the five lines they replace."""
    torch.manual_seed(3)
    mean, logvar = (leaf(6, 4, device=device) for _ in range(2))
    weight, x = leaf(4, 15, device=device), torch.randn(6, 15, device=device)
    key = NoiseKey(5)
    z, kl = reparameterize_kl(mean, logvar, key=key)
    out = elbo_loss(z @ weight, x, kl=kl, beta=0.5)
    actual = torch.autograd.grad(out.loss, (mean, logvar, weight))

    mean64, logvar64, weight64 = truth.double(mean, logvar, weight)
    z64 = mean64 + torch.exp(0.5 * logvar64) * truth.normals((6, 4), 5)
    squares = 0.5 * ((z64 @ weight64 - x.cpu().double()) ** 2 + math.log(2 * math.pi)).sum(1)
    kl64 = -0.5 * (1 + logvar64 - mean64**2 - logvar64.exp()).sum(1)
    loss64 = (squares + 0.5 * kl64).mean()
    assert_within(out.loss, loss64, 1e-5 * loss64)
    for a, e in zip(actual, torch.autograd.grad(loss64, (mean64, logvar64, weight64))):
        assert_within(a, e, 1e-5 * (e.abs() + e.abs().max()))


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_with_unit_variance_the_loss_is_half_the_squared_error_plus_a_constant(reduction, device):
    recon_x, x, mean, logvar = inputs(device)
    loss = elbo_loss(recon_x, x, mean, logvar, reduction=reduction).loss
    rows = 6 if reduction == "batchmean" else 1
    kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()
    textbook = (0.5 * F.mse_loss(recon_x, x, reduction="sum") + kl) / rows
    constant = 6 * 15 / rows * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(loss - constant, textbook, rtol=1e-5, atol=1e-5)
    tensors = (recon_x, x, mean, logvar)
    for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(textbook, tensors)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_parts_are_per_sample_and_detached(device):
    out = elbo_loss(*inputs(device), beta=2.0)
    assert isinstance(out, ELBOOutput)
    assert ELBOOutput._fields == ("loss", "log_likelihood", "kl")
    loss, log_likelihood, kl = out
    assert loss.requires_grad
    for part in (log_likelihood, kl):
        assert part.shape == (6,)
        assert not part.requires_grad
    torch.testing.assert_close(
        loss.detach(), -(log_likelihood - 2.0 * kl).mean(), rtol=1e-6, atol=0
    )


def test_the_parts_are_those_of_the_separate_operations(device):
    recon_x, x, mean, logvar = inputs(device)
    variance = leaf(3, 1, device=device)
    out = elbo_loss(recon_x, x, mean, logvar, recon_logvar=variance)
    expected = gaussian_log_likelihood(x, recon_x, variance)
    torch.testing.assert_close(out.log_likelihood, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.kl, gaussian_kl(mean, logvar), rtol=1e-6, atol=0)


def test_the_loss_is_the_same_with_and_without_gradients(device):
    tensors = inputs(device)
    with torch.no_grad():
        quiet = elbo_loss(*tensors)
    for a, b in zip(quiet, elbo_loss(*tensors)):
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_a_half_precision_decoder_beside_a_float32_posterior(device):
    recon_x, x, _, _ = inputs(device, torch.float16)
    _, _, mean, logvar = inputs(device)
    out = elbo_loss(recon_x, x, mean, logvar)
    expected = truth.elbo(*truth.double(recon_x, x, mean, logvar))
    assert_within(out.loss, expected, 1e-6 * expected)
    grads = torch.autograd.grad(out.loss, (recon_x, mean))
    assert [g.dtype for g in grads] == [torch.float16, torch.float32]
