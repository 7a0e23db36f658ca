"""Strides: any layout is read right, and the usual ones in place."""

import pytest
import torch

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize_kl,
)
from tests.ops import truth
from tests.ops.support import IN_PLACE, LAYOUTS, assert_within, laid_out, leaf

KEY = NoiseKey(seed=21)
SHAPES = [(4, 3, 5, 6), (1, 2, 1, 3), (3, 1, 4, 1), (2, 8, 16, 16)]


def mixed(layout, shape, interpreted):
    """The layout for every tensor, and beside contiguous ones: on the interpreter, which takes
    seconds for each, of one shape.
    """
    if interpreted and shape != SHAPES[0]:
        return ((layout, layout),)
    return (layout, layout), (layout, "contiguous"), ("contiguous", layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_samples", [None, 2])
def test_samples_and_kl_of_any_layout_agree_with_float64(num_samples, layout, device, interpreted):
    # Several samples of several tiles say nothing that each alone does not.
    for shape in SHAPES[:-1] if interpreted and num_samples else SHAPES:
        values = [leaf(*shape, device=device) for _ in range(4)]
        for of_mean, of_logvar in mixed(layout, shape, interpreted):
            inputs = [
                laid_out(t, la) for t, la in zip(values, (of_mean, of_logvar, of_logvar, of_mean))
            ]
            z, kl = reparameterize_kl(*inputs, key=KEY, num_samples=num_samples)
            upstream = torch.randn_like(z), torch.randn_like(kl)
            upstream = (
                laid_out(upstream[0][0], layout).expand_as(z)
                if num_samples
                else laid_out(upstream[0], layout),
                upstream[1],
            )
            grads = torch.autograd.grad((z, kl), inputs, upstream)

            inputs64 = truth.double(*values)
            eps = truth.normals(shape, KEY.seed, num_samples=num_samples)
            z64, kl64 = truth.sample(*inputs64[:2], eps), truth.kl(*inputs64)
            assert_within(z, z64, 1e-5 * (z64.abs() + 1))
            assert_within(kl, kl64, 1e-5 * (kl64 + 1))
            expected = torch.autograd.grad(
                (z64, kl64), inputs64, [u.cpu().double() for u in upstream]
            )
            for a, e in zip(grads, expected):
                assert_within(a, e, 1e-5 * (e.abs() + 30))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_likelihoods_of_any_layout_agree_with_float64(layout, device, interpreted):
    for shape in SHAPES:
        values = [leaf(*shape, device=device) for _ in range(2)]
        for of_x, of_mean in mixed(layout, shape, interpreted):
            for of_logvar in (None, "full", "per channel"):
                inputs = [laid_out(t, la) for t, la in zip(values, (of_x, of_mean))]
                logvar = None
                if of_logvar == "full":
                    logvar = laid_out(leaf(*shape, device=device), of_x)
                elif of_logvar == "per channel":
                    logvar = leaf(2 * shape[1], 1, 1, device=device)[::2].detach().requires_grad_()
                inputs += [logvar] if of_logvar else []
                ll = gaussian_log_likelihood(*inputs)
                upstream = torch.randn_like(ll)
                grads = torch.autograd.grad(ll, inputs, upstream)

                inputs64 = truth.double(*inputs)
                expected = truth.log_likelihood(*inputs64)
                assert_within(ll, expected, 1e-5 * (expected.abs() + 1))
                expected = torch.autograd.grad(expected, inputs64, upstream.cpu().double())
                for a, e in zip(grads, expected):
                    assert_within(a, e, 1e-5 * (e.abs() + 30))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elbo_losses_of_any_layout_agree_with_float64(layout, device, interpreted):
    for shape in SHAPES:
        values = [leaf(*shape, device=device) for _ in range(4)]
        for one, other in mixed(layout, shape, interpreted):
            inputs = [laid_out(t, la) for t, la in zip(values, (one, other, other, one))]
            loss = elbo_loss(*inputs).loss
            grads = torch.autograd.grad(loss, inputs)
            inputs64 = truth.double(*values)
            expected = truth.elbo(*inputs64)
            assert_within(loss, expected, 1e-5 * expected.abs())
            for a, e in zip(grads, torch.autograd.grad(expected, inputs64)):
                assert_within(a, e, 1e-5 * (e.abs() + 1))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed image", "batch innermost"]
)
def test_outputs_have_the_layout_of_a_dense_mean(layout, device):
    inputs = [laid_out(leaf(4, 3, 5, 6, device=device), layout) for _ in range(2)]
    z, kl = reparameterize_kl(*inputs, key=KEY)
    assert z.stride() == inputs[0].stride()
    for grad, t in zip(torch.autograd.grad(z.sum() + kl.sum(), inputs), inputs):
        assert grad.stride() == t.stride()


def copies(function):
    """Names of the operations that copied a tensor, inside the kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {event.name for event in profile.events()}
    assert any("fused_elbo" in name for name in names), (
        "the profiler saw no operation of the package"
    )
    return names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


@pytest.mark.kernels
@pytest.mark.parametrize("layout", IN_PLACE)
def test_the_layouts_that_occur_in_practice_are_read_without_a_copy(layout, device, interpreted):
    values = [laid_out(leaf(4, 4, 6, 6, device=device), layout) for _ in range(2)]
    prior = [torch.zeros(4, 1, 1, device=device) for _ in range(2)]
    moments = laid_out(leaf(4, 4, 6, 6, device=device), layout)

    def step():  # not backward(): accumulation into .grad copies a gradient that is not dense
        one = torch.ones((), device=device)
        outputs = reparameterize_kl(*values, *prior, key=KEY)
        torch.autograd.grad(outputs, values, [one.expand(t.shape) for t in outputs])
        torch.autograd.grad(
            DiagonalGaussian.from_moments(moments).sample_kl(key=KEY)[1].sum(), moments
        )
        torch.autograd.grad(gaussian_log_likelihood(*values).sum(), values)
        torch.autograd.grad(elbo_loss(*values, *values, recon_logvar=0.5).loss, values)

    step()
    # Triton's interpreter copies every storage to the host and back; a kernel's own copy clones.
    assert copies(step) <= ({"aten::copy_"} if interpreted else set())


@pytest.mark.kernels
def test_the_search_for_copies_finds_one(device):
    """Six event dimensions in reverse order cannot be merged into the four that kernels take."""
    mean = torch.randn(2, 3, 2, 3, 2, 3, 2, device=device).permute(0, 6, 5, 4, 3, 2, 1)
    logvar = torch.randn(mean.shape, device=device)
    assert copies(lambda: reparameterize_kl(mean, logvar, key=KEY))


def test_seven_dimensions_in_reverse_order_are_read_right(device):
    mean = (
        leaf(2, 3, 2, 3, 2, 3, 2, device=device)
        .detach()
        .permute(0, 6, 5, 4, 3, 2, 1)
        .requires_grad_()
    )
    logvar = leaf(*mean.shape, device=device)
    z, kl = reparameterize_kl(mean, logvar, key=KEY)
    grads = torch.autograd.grad((z.square().sum(), kl.sum()), (mean, logvar))
    mean64, logvar64 = truth.double(mean, logvar)
    z64 = truth.sample(mean64, logvar64, truth.normals(mean.shape, KEY.seed))
    kl64 = truth.kl(mean64, logvar64)
    assert_within(z, z64, 1e-5 * (z64.abs() + 1))
    assert_within(kl, kl64, 1e-5 * kl64)
    expected = torch.autograd.grad((z64.square().sum(), kl64.sum()), (mean64, logvar64))
    for a, e in zip(grads, expected):
        assert_within(a, e, 1e-5 * (e.abs() + 10))


@pytest.mark.parametrize(
    "order",
    [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (1, 0, 4, 3, 2), (4, 3, 2, 1, 0), (0, 1, 4, 2, 3)],
    ids=str,
)
def test_five_dimensions_in_any_order_are_read_right(order, device):
    """Video: [B, C, T, H, W] in whatever order it was stored."""
    stored = [(2, 3, 4, 5, 6)[d] for d in order]
    back = [order.index(d) for d in range(5)]
    mean, logvar, x = (
        leaf(*stored, device=device).detach().permute(back).requires_grad_() for _ in range(3)
    )
    assert mean.shape == (2, 3, 4, 5, 6)
    z, kl = reparameterize_kl(mean, logvar, key=KEY)
    ll = gaussian_log_likelihood(x, mean, logvar)
    mean64, logvar64, x64 = truth.double(mean, logvar, x)
    z64 = truth.sample(mean64, logvar64, truth.normals(mean.shape, KEY.seed))
    assert_within(z, z64, 1e-5 * (z64.abs() + 1))
    for nats, expected in (
        (kl, truth.kl(mean64, logvar64)),
        (ll, truth.log_likelihood(x64, mean64, logvar64)),
    ):
        assert_within(nats, expected, 1e-5 * expected.abs())


def test_expanded_inputs_are_read_right_and_their_gradient_is_summed(device):
    """The same posterior for every row, the same logvar for every element: stride 0."""
    row, number = leaf(5, 4, device=device), leaf(device=device)
    z, kl = reparameterize_kl(row.expand(6, 5, 4), number.expand(6, 5, 4), key=KEY)
    upstream = torch.randn_like(z)
    grads = torch.autograd.grad((z, kl.sum()), (row, number), (upstream, None))
    row64, number64 = truth.double(row, number)
    mean64, logvar64 = row64.expand(6, 5, 4), number64.expand(6, 5, 4)
    z64 = truth.sample(mean64, logvar64, truth.normals((6, 5, 4), KEY.seed))
    kl64 = truth.kl(mean64, logvar64)
    assert_within(z, z64, 1e-5 * (z64.abs() + 1))
    assert_within(kl, kl64, 1e-5 * kl64)
    expected = torch.autograd.grad(
        (z64, kl64.sum()), (row64, number64), (upstream.cpu().double(), None)
    )
    for a, e in zip(grads, expected):
        assert_within(a, e, 1e-5 * (e.abs() + 20))


EMPTY = [(0,), (0, 4), (3, 0), (0, 3, 2), (2, 0, 5), (2, 3, 0)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("num_samples", [None, 2])
def test_empty_batches_and_empty_events_work(num_samples, shape, device):
    mean, logvar, x = (leaf(*shape, device=device) for _ in range(3))
    z, kl = reparameterize_kl(mean, logvar, key=KEY, num_samples=num_samples)
    assert z.shape == ((num_samples, *shape) if num_samples else shape)
    out = elbo_loss(mean, x, mean, logvar, reduction="sum")
    ll = gaussian_log_likelihood(x, mean, logvar)
    zeros = torch.zeros(shape[0])
    for nats in (kl, ll, out.kl, out.log_likelihood):
        assert torch.equal(nats.cpu(), zeros)
    assert out.loss == 0
    (z.sum() + kl.sum() + ll.sum() + out.loss).backward()
    for t in (mean, logvar, x):
        assert t.grad.shape == shape
    for reduction, value in (("sum", 0.0), ("none", None)):
        total = gaussian_kl(mean, logvar, reduction=reduction)
        assert total.numel() == 0 if value is None else total == value


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_a_shared_variance_gets_a_zero_gradient_from_nothing(shape, device):
    logvar = leaf(device=device)
    gaussian_log_likelihood(
        leaf(*shape, device=device), leaf(*shape, device=device), logvar
    ).sum().backward()
    assert logvar.grad == 0


def test_the_mean_over_an_empty_batch_is_nan_as_in_torch(device):
    empty = torch.zeros(0, 3, device=device)
    assert gaussian_kl(empty, empty, reduction="batchmean").isnan()
    assert elbo_loss(empty, empty, empty, empty).loss.isnan()


def test_a_tensor_of_one_dimension_is_a_batch_of_scalars(device):
    mean, logvar, x = (leaf(37, device=device) for _ in range(3))
    z, kl = reparameterize_kl(mean, logvar, key=KEY)
    assert z.shape == kl.shape == (37,)
    wide = reparameterize_kl(mean.unsqueeze(1), logvar.unsqueeze(1), key=KEY)
    assert torch.equal(z, wide[0].squeeze(1))
    assert torch.equal(kl, wide[1])
    ll = gaussian_log_likelihood(x, mean, logvar)
    expected = truth.log_likelihood(*truth.double(x, mean, logvar))
    assert_within(ll, expected, 1e-6 * (expected.abs() + 10))
