"""What a row's result depends on: its elements and its place, and nothing of how the work is
divided.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_elbo import reference
from fused_elbo.noise import NoiseKey
from fused_elbo.parametrization import PLAIN_SCALE, SOFTPLUS_STD, ScaleParams
from fused_elbo.schemas import BATCHMEAN, NONE, SAMPLE, SUM
from fused_elbo.triton import latent_operations, launch, likelihood_operations

KEY = NoiseKey(seed=0x0123456789ABCDEF, stream=5, row_offset=3)
#: One, below and above a group of 4 and of 8, several rows to a program, one, several tiles, and a
#: second stage.
EVENTS = [1, 3, 4, 6, 8, 12, 20, 63, 64, 130, 1000, 1023, 1024, 1027, 5 * 1024 + 6]


@pytest.fixture(autouse=True)
def unwritten_outputs_are_nan() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)


def forward(
    mean: Tensor, logvar: Tensor, key: NoiseKey = KEY, reduction: int = SAMPLE
) -> tuple[Tensor, Tensor]:
    return latent_operations.latent_forward(
        mean,
        logvar,
        None,
        None,
        None,
        seed_value=key.seed,
        stream=key.stream,
        row_offset=key.row_offset,
        reduction=reduction,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("event", EVENTS)
def test_samples_and_kl_of_every_row_length_agree_with_float64(
    event: int, dtype: torch.dtype
) -> None:
    mean, logvar = torch.randn(2, 3, event, dtype=torch.float64).to(dtype)
    z, kl = forward(mean, logvar)
    eps = reference.normals(KEY, mean.shape, dtype).double()
    true_z, true_kl = reference.sample_and_kl(
        mean.double(), logvar.double(), None, None, eps, PLAIN_SCALE, "sample"
    )
    std = torch.exp(0.5 * logvar.double())
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3}[dtype]
    assert (
        (z.double() - true_z).abs() <= bound * (mean.double().abs() + std * (1 + eps.abs()))
    ).all()
    torch.testing.assert_close(
        kl.double(), true_kl, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0
    )


@pytest.mark.parametrize("event", EVENTS)
def test_a_row_alone_has_the_bits_it_has_in_its_batch(event: int) -> None:
    mean, logvar = torch.randn(2, 5, event)
    z, kl = forward(mean, logvar)
    for row in (0, 3):
        alone = forward(mean[row : row + 1], logvar[row : row + 1], KEY.rows(row))
        assert torch.equal(alone[0], z[row : row + 1])
        assert torch.equal(alone[1], kl[row : row + 1])


@pytest.mark.parametrize("policy", ["softplus", "mask"])
@pytest.mark.parametrize("event", [6, 64, 1027, 5 * 1024 + 6])
def test_policies_hold_in_rows_of_every_length(event: int, policy: str) -> None:
    """A parameter of 0 and a mask that is absent are what an element beyond a row's end would
    have.
    """
    scale = ScaleParams(SOFTPLUS_STD, 1e-3) if policy == "softplus" else PLAIN_SCALE
    mask = torch.rand(3, event) < 0.5 if policy == "mask" else None
    mean, p, grad_z = torch.randn(3, 3, event, dtype=torch.float64)
    grad_kl = torch.randn(3, dtype=torch.float64)
    eps = reference.normals(KEY, mean.shape, torch.float64)
    common = (scale, "sample")
    true_z, true_kl = reference.sample_and_kl(mean, p, None, None, eps, *common, mask)
    true_grads = reference.sample_and_kl_backward(
        mean, p, None, None, eps, *common, grad_z, grad_kl, mask
    )
    params = (None, mask, KEY.seed, KEY.stream, KEY.row_offset, 0, -1, *scale)
    z, kl = latent_operations.latent_forward(mean, p, None, None, *params)
    grads = latent_operations.latent_backward(mean, p, None, None, grad_z, grad_kl, *params)
    for got, truth in zip((z, kl, *grads[:2]), (true_z, true_kl, *true_grads[:2])):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)

    ll = likelihood_operations.likelihood_forward(z, mean, p, mask, 0.0, 1, SAMPLE, *scale)
    truth = reference.log_likelihood(z, mean, p, 1, "sample", scale, mask)
    torch.testing.assert_close(ll, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("event", [64, 1024, 5120])
def test_misaligned_rows_have_the_bits_of_aligned_ones(event: int) -> None:
    wide = torch.randn(2, 2, event + 4)
    mean, logvar = wide[..., 1 : event + 1]
    for got, expected in zip(
        forward(mean, logvar), forward(mean.contiguous(), logvar.contiguous())
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("row_offset", [2**31, 2**40 + 1, 2**57 + 3])
def test_rows_far_into_a_batch_have_their_own_noise(row_offset: int) -> None:
    key = NoiseKey(seed=-1, row_offset=row_offset)
    mean = torch.zeros(2, 37)
    z, _ = forward(mean, mean, key)
    # The flat index is a 64-bit product: the reference takes it from Python's integers, 37 elements
    # further each row.
    start = row_offset * 37
    words = reference.philox_words(key, 0, start // 4, 20)
    u = reference.uniforms(words, torch.float32)
    radius, angle = torch.sqrt(-2 * torch.log(u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    eps = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), 2).flatten()[
        start % 4 :
    ][:74]
    torch.testing.assert_close(z.double(), eps.reshape(2, 37), rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("reduction", [SUM, BATCHMEAN])
@pytest.mark.parametrize(("rows", "event"), [(3, 10), (40, 100), (2, 5000)])
def test_totals_are_sums_over_all_programs(rows: int, event: int, reduction: int) -> None:
    mean, logvar = torch.randn(2, rows, event)
    _, total = forward(mean, logvar, reduction=reduction)
    _, per_element = forward(mean.double(), logvar.double(), reduction=NONE)
    expected = per_element.sum() / (rows if reduction == BATCHMEAN else 1)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)


def test_many_parts_take_several_rounds_to_add_up() -> None:
    parts = torch.randn(20 * launch.geometry.TILE + 17, dtype=torch.float64)
    out = torch.empty((), dtype=torch.float64)
    with launch.recording() as launches:
        launch.add_all(parts, out)
    assert [one.programs for one in launches] == [3, 1]
    launch.add_all(parts, out)
    torch.testing.assert_close(out, parts.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("parts", [1, 5, 64, 1500])
def test_parts_of_rows_add_up_per_row(parts: int) -> None:
    values = torch.randn(70, parts, dtype=torch.float64)
    out = torch.empty(70, dtype=torch.float64)
    launch.add_rows(values, 70, out)
    torch.testing.assert_close(out, values.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (3, 1, 1),
        (2, 1, 1, 1),
        (2, 3, 1, 1),
        (7, 9),
        (3, 7, 9),
        (2, 1, 7, 9),
        (2, 3, 7, 9),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_the_gradient_of_logvar_is_summed_over_what_it_broadcasts_over(
    shape: tuple[int, ...], last: bool
) -> None:
    memory = torch.channels_last if last else torch.contiguous_format
    x, mean = (torch.randn(2, 3, 7, 9).contiguous(memory_format=memory) for _ in range(2))
    logvar, grad = torch.randn(shape), torch.randn(2)
    got = likelihood_operations.likelihood_backward(x, mean, logvar, grad, True, True)
    expected = reference.log_likelihood_backward(
        x.double(), mean.double(), logvar.double(), 1, "sample", grad.double()
    )
    for value, truth in zip(got, expected):
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5)
    ll = likelihood_operations.likelihood_forward(x, mean, logvar)
    truth = reference.log_likelihood(x.double(), mean.double(), logvar.double(), 1, "sample")
    torch.testing.assert_close(ll.double(), truth, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("event", [(40,), (3, 8, 32)])
@pytest.mark.parametrize("learned", [False, True])
def test_the_shared_run_of_a_variance_is_long_enough_to_be_a_row(
    event: tuple[int, ...], learned: bool
) -> None:
    """One variance per channel of 256 elements: rows are channels, and a sample's likelihood is
    summed over them.
    """
    samples, batch = 2, 3
    x = torch.randn(batch, *event).expand(samples, batch, *event)
    mean = torch.randn(samples, batch, *event)
    logvar = torch.randn((event[0], *(1,) * (len(event) - 1))) if learned else None
    true_logvar = 0.0 if logvar is None else logvar.double()
    ll = likelihood_operations.likelihood_forward(x, mean, logvar, batch_dims=2)
    truth = reference.log_likelihood(x.double(), mean.double(), true_logvar, 2, "sample")
    torch.testing.assert_close(ll.double(), truth, rtol=1e-6, atol=1e-4)
    grad = torch.randn(samples, batch)
    got = likelihood_operations.likelihood_backward(
        x, mean, logvar, grad, True, learned, batch_dims=2
    )
    expected = reference.log_likelihood_backward(
        x.double(), mean.double(), true_logvar, 2, "sample", grad.double()
    )
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    if learned:
        torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-5, atol=2e-5)
