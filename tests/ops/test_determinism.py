"""Determinism: the same bits for every thread count, batch size and place in memory."""

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
from tests.ops.support import leaf

# The reference sums with torch, whose order of summation is its own.
pytestmark = pytest.mark.kernels
KEY = NoiseKey(seed=15)


def results(tensors, shared):
    """Outputs and gradients of every operation, those summed over the whole batch too."""
    a, b, c, d = tensors
    everything = []

    def add(outputs, inputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [
            torch.linspace(0.5, 2, t.numel(), device=t.device).view(t.shape) for t in outputs
        ]
        everything.extend((*outputs, *torch.autograd.grad(outputs, inputs, upstream)))

    for reduction in ("sample", "sum", "batchmean"):
        add(reparameterize_kl(a, b, c, d, key=KEY, reduction=reduction), (a, b, c, d))
        add(gaussian_log_likelihood(a, b, c, reduction=reduction), (a, b, c))
        add(
            elbo_loss(a, b, c, d, recon_logvar=shared, reduction=reduction).loss,
            (a, b, c, d, shared),
        )
    add(reparameterize_kl(a, b, key=KEY, num_samples=2), (a, b))
    add(gaussian_log_likelihood(a, b, shared), (a, b, shared))
    if a.dim() > 1 and a.shape[1] % 2 == 0:
        add(DiagonalGaussian.from_moments(a).sample_kl(key=KEY), (a,))
    return everything


# Few long rows, many short rows, images, and rows that split into unequal parts.
SHAPES = [(3, 50_001), (20_000, 6), (16, 4, 48, 48), (7, 9_999)]
SMALL = [(3, 2_001), (70, 6), (2, 4, 8, 8)]


def shapes(interpreted):
    return SMALL if interpreted else SHAPES


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, device, interpreted):
    for shape in shapes(interpreted):
        tensors = [leaf(*shape, dtype=dtype, device=device) for _ in range(4)]
        shared = leaf(*shape[1:2], *(1,) * (len(shape) - 2), device=device)
        torch.set_num_threads(1)
        expected = results(tensors, shared)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for a, e in zip(results(tensors, shared), expected, strict=True):
                assert torch.equal(a, e)


def test_a_second_run_changes_no_bit(device, interpreted):
    for shape in shapes(interpreted):
        tensors, shared = [leaf(*shape, device=device) for _ in range(4)], leaf(device=device)
        for a, e in zip(results(tensors, shared), results(tensors, shared), strict=True):
            assert torch.equal(a, e)


def per_row(tensors, key):
    """What every row has of its own: outputs and gradients for one upstream gradient per row."""
    a, b, c, d = tensors
    z, kl = reparameterize_kl(a, b, c, d, key=key)
    ll = gaussian_log_likelihood(a, b, c)
    out = elbo_loss(a, b, c, d, reduction="sample")
    values = (z, kl, ll, out.loss)
    grads = [
        g
        for v in values
        for g in torch.autograd.grad(v.sum(), tensors, retain_graph=True, allow_unused=True)
    ]
    return [*values, out.kl, out.log_likelihood, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_row_of_a_batch_is_the_row_alone(dtype, device, interpreted):
    for shape in (
        [(5, 37), (3, 2_001)]
        if interpreted
        else [(9, 7), (5, 37), (40, 130), (4, 20_003), (2, 300_000), (3, 2, 5, 9)]
    ):
        tensors = [leaf(*shape, dtype=dtype, device=device) for _ in range(4)]
        whole = per_row(tensors, KEY)
        for row in (0, 1, shape[0] - 1):
            alone = per_row(
                [t.detach()[row : row + 1].requires_grad_() for t in tensors], KEY.rows(row)
            )
            for i, (a, e) in enumerate(zip(alone, whole, strict=True)):
                assert torch.equal(a[0], e[row]), f"{i}: row {row} of {shape}"


def test_a_larger_batch_begins_with_the_smaller(device, interpreted):
    for shape in [(70, 6)] if interpreted else [(3000, 6), (30, 5_000)]:
        tensors = [leaf(*shape, device=device) for _ in range(4)]
        whole = per_row(tensors, KEY)
        part = per_row([t.detach()[: shape[0] // 3].requires_grad_() for t in tensors], KEY)
        for a, e in zip(part, whole, strict=True):
            assert torch.equal(a, e[: shape[0] // 3])


@pytest.mark.parametrize("extreme", [170.0, -400.0, float("nan")])
@pytest.mark.parametrize("where", [1, 3], ids=["logvar", "prior logvar"])
def test_an_extreme_logvar_changes_no_bit_of_its_neighbours(where, extreme, device, interpreted):
    """The CPU's loops for logvars near 0 leave such a block to loops for any logvar."""

    def elements(tensors, with_prior):
        arguments = tensors if with_prior else tensors[:2]
        z, kl = reparameterize_kl(*arguments, key=KEY, reduction="none")
        row_kl = reparameterize_kl(*arguments, key=KEY)[1]
        grads = torch.autograd.grad([z.sum(), kl.sum(), row_kl.sum()], arguments)
        return [z, kl, *grads], row_kl

    for shape in [(4, 65)] if interpreted else [(9, 7), (40, 130), (3, 5_000)]:
        tensors = [leaf(*shape, device=device) for _ in range(4)]
        changed = [t.detach().clone() for t in tensors]
        changed[where][1, 5] = extreme
        changed = [t.requires_grad_() for t in changed]
        others = torch.ones(shape, dtype=torch.bool, device=device)
        others[1, 5] = False
        for with_prior in (False, True) if where == 1 else (True,):
            expected, expected_rows = elements(tensors, with_prior)
            actual, actual_rows = elements(changed, with_prior)
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a[others], e[others]), f"{shape}"
            assert not torch.equal(actual[1][1, 5], expected[1][1, 5])
            assert torch.equal(actual_rows[[0, 2]], expected_rows[[0, 2]])


def test_the_kl_alone_is_the_kl_beside_samples(device, interpreted):
    for shape in [(4, 65)] if interpreted else [(9, 7), (40, 130), (3, 5_000)]:
        for dtype in (torch.float32, torch.float64):
            tensors = [leaf(*shape, dtype=dtype, device=device) for _ in range(4)]
            for arguments in (tensors[:2], tensors):
                alone = gaussian_kl(*arguments)
                for num_samples in (None, 2):
                    kl = reparameterize_kl(*arguments, key=KEY, num_samples=num_samples)[1]
                    assert torch.equal(alone, kl), f"{shape}, {dtype}, {num_samples} samples"


def test_where_a_tensor_lies_in_memory_changes_no_bit(device, interpreted):
    """Vector loops must not peel off elements by address."""
    shape = (3, 37) if interpreted else (5, 1_003)
    tensors = [leaf(*shape, device=device) for _ in range(4)]
    expected = per_row(tensors, KEY)
    for shift in (1, 2, 3, 5):
        moved = []
        for t in tensors:
            flat = torch.zeros(t.numel() + shift, device=device)
            flat[shift:] = t.detach().flatten()
            moved.append(flat[shift:].view(shape).requires_grad_())
        for a, e in zip(per_row(moved, KEY), expected, strict=True):
            assert torch.equal(a, e)


def test_nothing_depends_on_what_an_output_held_before(device):
    """Outputs are torch.empty: the suite fills them with NaN, this test with numbers."""
    tensors, shared = [leaf(6, 40, device=device) for _ in range(4)], leaf(device=device)
    expected = results(tensors, shared)
    torch.use_deterministic_algorithms(False)
    junk = [torch.full((n,), 1e30, device=device) for n in (1, 6, 40, 240, 480) for _ in range(8)]
    del junk  # back to the allocator, to be handed out again
    for a, e in zip(results(tensors, shared), expected, strict=True):
        assert torch.equal(a, e)
