"""Masks: elements that do not count give nothing, whatever they hold.

What is left is compared with calls without a mask: bitwise where it is an element's own, and to
1e-5 where up to 120 float32 terms of magnitude 10 are summed in another order.
"""

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
    reparameterize_kl,
)
from tests.ops.support import DTYPES, laid_out, leaf

KEY = NoiseKey(seed=41)
BROADCASTS = [(3, 4, 5, 6), (3, 1, 5, 6), (3, 1, 1, 1), (4, 1, 1), (6,), ()]


def random_mask(shape, device):
    return (torch.rand(shape) < 0.6).to(device)


def spoiled(t, mask):
    """NaN and infinity where nothing may look."""
    bad = torch.full_like(t, math.nan)
    bad[1:] = math.inf
    return torch.where(mask.expand(t.shape), t.detach(), bad).requires_grad_()


@pytest.mark.parametrize("broadcast", BROADCASTS, ids=str)
@pytest.mark.parametrize("with_prior", [False, True], ids=["standard prior", "prior"])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_masked_latents_give_zero_and_no_gradient(num_samples, with_prior, broadcast, device):
    clean = [leaf(3, 4, 5, 6, device=device) for _ in range(4 if with_prior else 2)]
    mask = random_mask(broadcast, device)
    inputs = [spoiled(t, mask) for t in clean]
    z, kl = reparameterize_kl(*inputs, key=KEY, num_samples=num_samples, mask=mask)
    grad_z = torch.where(mask, torch.randn_like(z), torch.full_like(z, math.nan))
    grad_kl = torch.randn_like(kl)
    grads = torch.autograd.grad((z, kl), inputs, (grad_z, grad_kl))

    # The same from calls without a mask: what remains is bitwise theirs.
    z_all, _ = reparameterize_kl(*clean, key=KEY, num_samples=num_samples)
    kl_each = gaussian_kl(*clean, reduction="none")
    assert torch.equal(z, torch.where(mask, z_all, 0.0))
    expected = torch.where(mask, kl_each, 0.0).flatten(1).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    each = gaussian_kl(*inputs, mask=mask, reduction="none")
    assert torch.equal(each, torch.where(mask, kl_each, 0.0))

    zeroed = torch.where(mask, grad_z, 0.0)
    whole = (torch.where(mask, z_all, 0.0) * zeroed).sum() + (expected * grad_kl).sum()
    for a, e in zip(grads, torch.autograd.grad(whole, clean)):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        assert not a[~mask.expand(a.shape)].any()


def test_a_clamp_without_zero_leaves_what_is_masked_without_nats(device):
    moments = leaf(2, 4, 6, device=device)
    mask = random_mask((2, 1, 6), device)
    q = DiagonalGaussian.from_moments(moments, clamp=(0.5, 2.0))
    each = torch.where(mask, q.kl(reduction="none"), 0.0)
    torch.testing.assert_close(q.kl(mask=mask), each.flatten(1).sum(1))
    assert torch.equal(q.kl(mask=mask, reduction="none"), each)


VARIANCES = {
    "unit": None,
    "number": -0.5,
    "one learned variance": (),
    "per channel": (4, 1, 1),
    "per pixel": (5, 6),
    "full": (3, 4, 5, 6),
}


@pytest.mark.parametrize("broadcast", BROADCASTS, ids=str)
@pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES)
def test_masked_pixels_give_zero_and_no_gradient(variance, broadcast, device):
    x, mean = leaf(3, 4, 5, 6, device=device), leaf(3, 4, 5, 6, device=device)
    mask = random_mask(broadcast, device)
    logvar = leaf(*variance, device=device) if isinstance(variance, tuple) else variance
    inputs = [spoiled(x, mask), spoiled(mean, mask)]
    clean = [x, mean]
    arguments = [*inputs, logvar]
    if isinstance(variance, tuple):
        if len(variance) == 4:
            arguments[2] = spoiled(logvar, mask)
        inputs.append(arguments[2])
        clean.append(logvar)
    ll = gaussian_log_likelihood(*arguments, mask=mask)
    upstream = torch.randn_like(ll)
    grads = torch.autograd.grad(ll, inputs, upstream)

    each = gaussian_log_likelihood(x, mean, logvar, reduction="none")
    expected = torch.where(mask, each, 0.0).flatten(1).sum(1)
    torch.testing.assert_close(ll, expected, rtol=1e-5, atol=1e-4)
    masked_each = gaussian_log_likelihood(*arguments, mask=mask, reduction="none")
    assert torch.equal(masked_each, torch.where(mask, each, 0.0))
    for a, e in zip(grads, torch.autograd.grad(expected, clean, upstream, retain_graph=True)):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)

    out = elbo_loss(inputs[1], inputs[0], kl=upstream, recon_logvar=arguments[2], mask=mask)
    torch.testing.assert_close(out.log_likelihood, ll, rtol=1e-6, atol=1e-5)
    grads = torch.autograd.grad(out.loss, inputs)
    loss = (upstream - expected).mean()
    for a, e in zip(grads, torch.autograd.grad(loss, clean)):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reduction", ["sample", "sum", "batchmean"])
def test_reductions_are_over_what_counts(reduction, device):
    mean, logvar, x = (leaf(3, 4, 5, device=device) for _ in range(3))
    mask = random_mask((3, 1, 5), device)
    for masked, each in (
        (
            gaussian_kl(mean, logvar, mask=mask, reduction=reduction),
            gaussian_kl(mean, logvar, reduction="none"),
        ),
        (
            gaussian_log_likelihood(x, mean, logvar, mask=mask, reduction=reduction),
            gaussian_log_likelihood(x, mean, logvar, reduction="none"),
        ),
    ):
        rows = torch.where(mask, each, 0.0).flatten(1).sum(1)
        expected = {"sample": rows, "sum": rows.sum(), "batchmean": rows.mean()}[reduction]
        torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_serve_every_dtype(dtype, device):
    mean, logvar, x = (leaf(3, 40, dtype=dtype, device=device) for _ in range(3))
    mask = random_mask((3, 40), device)
    z, kl = reparameterize_kl(mean, logvar, key=KEY, mask=mask)
    assert z.dtype == dtype
    assert torch.equal(z, torch.where(mask, reparameterize_kl(mean, logvar, key=KEY)[0], 0.0))
    each = torch.where(mask, gaussian_kl(mean, logvar, reduction="none"), 0.0)
    torch.testing.assert_close(kl, each.sum(1), rtol=1e-5, atol=1e-5)
    ll = gaussian_log_likelihood(x, mean, logvar, mask=mask)
    each = torch.where(mask, gaussian_log_likelihood(x, mean, logvar, reduction="none"), 0.0)
    torch.testing.assert_close(ll, each.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "every second row", "last dimension strided"])
def test_masks_meet_operands_of_any_layout(layout, device):
    values = [leaf(4, 4, 6, 6, device=device) for _ in range(2)]
    for mask_layout in ("contiguous", layout):
        mask = laid_out(random_mask((4, 4, 6, 6), device).float(), mask_layout).bool()
        if mask_layout != "contiguous":
            mask = torch.stack((mask, mask), -1)[..., 0]
        mean, logvar = (laid_out(t, layout) for t in values)
        z, kl = reparameterize_kl(mean, logvar, key=KEY, mask=mask)
        z_dense, kl_dense = reparameterize_kl(*values, key=KEY, mask=mask.contiguous())
        torch.testing.assert_close(z, z_dense, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kl, kl_dense, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(z.sum() + kl.sum(), (mean, logvar))
        expected = torch.autograd.grad(z_dense.sum() + kl_dense.sum(), values)
        for a, e in zip(grads, expected):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_long_rows_and_short_ones(device, interpreted):
    for shape in [(70, 9)] if interpreted else [(300, 9), (2, 20011), (5, 700, 3)]:
        mean, logvar, x = (leaf(*shape, device=device) for _ in range(3))
        mask = random_mask(shape, device)
        kl = gaussian_kl(mean, logvar, mask=mask)
        each = torch.where(mask, gaussian_kl(mean, logvar, reduction="none"), 0.0)
        torch.testing.assert_close(kl, each.flatten(1).sum(1), rtol=1e-5, atol=1e-4)
        for variance in (None, leaf(device=device), logvar):
            ll = gaussian_log_likelihood(x, mean, variance, mask=mask)
            each = gaussian_log_likelihood(x, mean, variance, reduction="none")
            expected = torch.where(mask, each, 0.0).flatten(1).sum(1)
            torch.testing.assert_close(ll, expected, rtol=1e-5, atol=1e-3)


def test_masked_gradients_to_second_order(device):
    inputs = [leaf(2, 3, dtype=torch.float64, device=device) for _ in range(4)]
    mask = torch.tensor([[True, False, True], [False, False, True]], device=device)

    def z_kl(*t):
        return reparameterize_kl(*t, key=KEY, mask=mask)

    assert gradcheck(z_kl, inputs)
    assert gradgradcheck(z_kl, inputs)

    def ll(*t):
        return gaussian_log_likelihood(*t, mask=mask)

    assert gradcheck(ll, inputs[:3])
    assert gradgradcheck(ll, inputs[:3])

    def loss(*t):
        return elbo_loss(*t, mask=mask).loss

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_second_derivatives_stay_clear_of_what_is_masked(device):
    mask = torch.tensor([[True, False]], device=device)
    mean = torch.tensor([[0.5, math.nan]], device=device, requires_grad=True)
    var = torch.tensor([[0.5, 0.0]], device=device, requires_grad=True)
    kl = gaussian_kl(mean, var, mask=mask, param="var").sum()
    (first,) = torch.autograd.grad(kl, var, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), var)
    assert first.tolist()[0] == pytest.approx([0.5 * (1 - 1 / 0.5), 0.0])
    assert second.tolist()[0] == pytest.approx([0.5 / 0.25, 0.0])


def test_a_gaussian_takes_a_mask(device):
    moments = leaf(2, 4, 6, device=device)
    mask = random_mask((2, 1, 6), device)
    q = DiagonalGaussian.from_moments(moments)
    mean, logvar = moments.chunk(2, 1)
    z, kl = q.sample_kl(key=KEY, mask=mask)
    z_pair, kl_pair = reparameterize_kl(mean, logvar, key=KEY, mask=mask)
    torch.testing.assert_close(z, z_pair)
    torch.testing.assert_close(kl, kl_pair)
    torch.testing.assert_close(q.kl(mask=mask), kl_pair)
    assert torch.equal(q.rsample(key=KEY, mask=mask), z)
    ll = q.log_prob(z.detach(), mask=mask)
    torch.testing.assert_close(ll, gaussian_log_likelihood(z, mean, logvar, mask=mask))


def test_compiled_and_mapped_code_takes_masks(device):
    mean, logvar = leaf(4, 6, device=device), leaf(4, 6, device=device)
    mask = random_mask((4, 6), device)

    def step(mean, logvar, mask):
        z, kl = reparameterize_kl(mean, logvar, key=KEY, mask=mask)
        return (gaussian_log_likelihood(z, mean, logvar, mask=mask) - kl).sum()

    eager = torch.autograd.grad(step(mean, logvar, mask), (mean, logvar))
    compiled = torch.compile(step, fullgraph=True)(mean, logvar, mask)
    for a, e in zip(torch.autograd.grad(compiled, (mean, logvar)), eager):
        torch.testing.assert_close(a, e)
    detached = mean.detach(), logvar.detach()
    for a, e in zip(torch.func.grad(step, (0, 1))(*detached, mask), eager):
        torch.testing.assert_close(a, e)
    mapped = torch.func.vmap(lambda m, v, k: gaussian_kl(m[None], v[None], mask=k[None])[0])
    expected = gaussian_kl(*detached, mask=mask)
    torch.testing.assert_close(mapped(*detached, mask), expected, rtol=1e-6, atol=1e-6)


def test_rows_are_the_same_alone_and_in_a_batch(device):
    mean, logvar = leaf(6, 50, device=device), leaf(6, 50, device=device)
    mask = random_mask((6, 50), device)
    z, kl = reparameterize_kl(mean, logvar, key=KEY, mask=mask)
    for row in range(6):
        one = slice(row, row + 1)
        z_one, kl_one = reparameterize_kl(mean[one], logvar[one], key=KEY.rows(row), mask=mask[one])
        assert torch.equal(z[one], z_one)
        assert torch.equal(kl[one], kl_one)


def test_a_bad_mask_is_refused():
    mean = torch.zeros(2, 3)
    for call in (
        lambda mask: reparameterize_kl(mean, mean, mask=mask),
        lambda mask: gaussian_log_likelihood(mean, mean, mask=mask),
        lambda mask: elbo_loss(mean, mean, mean, mean, mask=mask),
    ):
        with pytest.raises(TypeError, match="mask must be a bool tensor, True where"):
            call(torch.ones(2, 3))
        with pytest.raises(TypeError, match="mask must be a tensor, got list"):
            call([True])
        with pytest.raises(ValueError, match=r"mask must broadcast to the shape \(2, 3\)"):
            call(torch.ones(4, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"mask must broadcast to the shape \(2, 3\)"):
            call(torch.ones(2, 2, 3, dtype=torch.bool))
