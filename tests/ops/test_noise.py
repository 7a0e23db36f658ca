"""The noise contract: which words, which normals, their distribution; backward draws them again."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from fused_elbo import NoiseKey, backends, reference, reparameterize, reparameterize_kl
from tests.ops import truth
from tests.ops.support import NORMALS, assert_within, leaf

# kat_vectors of Random123 1.14.0, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def noise_words(backend, device, seed, stream, sample, first, count):
    """The words that a backend computes for counters ``first ..`` of a stream and a sample."""
    kernels = backends.select(device.type, backend)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    tensor = torch.tensor(signed, device=device)
    if kernels is None:
        return reference.philox_words(NoiseKey(tensor, stream), sample, first, count, device)
    return kernels.noise_words(tensor, stream, sample, first, count)


def normals(shape, device, key, dtype=torch.float32, **options):
    """The noise itself: z with mean 0 and logvar 0."""
    zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)
    return reparameterize(zeros, zeros, key=key, **options)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_words_are_the_known_answers_of_random123(counter, key, result, backend, device):
    first = counter[0] | counter[1] << 32
    first = first - (1 << 64) if first >= 1 << 63 else first
    seed = key[0] | key[1] << 32
    words = noise_words(backend, device, seed, counter[3], counter[2], first, 1)
    assert tuple(words[0].tolist()) == result
    assert tuple(truth.philox(np.array([counter], dtype=np.uint64), key)[0].tolist()) == result


@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**40 + 3, 2**61])
def test_words_are_bit_identical_to_those_of_the_contract(first, backend, device):
    for seed, stream, sample in (
        (0, 0, 0),
        (2**64 - 1, 2**32 - 1, 7),
        (-(2**63), 5, 2**31),
        (0x123456789ABCDEF0, 1, 0),
    ):
        words = noise_words(backend, device, seed % 2**64, stream, sample, first, 333)
        expected = truth.words(seed, first, 333, sample, stream)
        assert torch.equal(words.cpu(), torch.from_numpy(expected.astype(np.int64)))


@pytest.mark.parametrize("shape", [(10, 8), (7, 13), (5, 1), (64, 3, 5, 2)], ids=str)
def test_every_element_has_a_counter_and_lane_of_its_own(shape, device):
    """Element i is lane i % 4 of counter i // 4: no draw is used twice, none is left out."""
    num_samples = 3
    z = normals(shape, device, NoiseKey(99, stream=4), torch.float64, num_samples=num_samples).cpu()
    total = math.prod(shape)
    pool = {}
    for k in range(num_samples):
        for position, eps in enumerate(
            truth.normals(
                ((total + 3) // 4, 4), 99, 4, 0, dtype=torch.float64, num_samples=num_samples
            )[k].flatten()
        ):
            pool[round(eps.item(), 9)] = (k, position)
    assert (
        len(pool) == num_samples * ((total + 3) // 4) * 4
    )  # all values differ, so a value tells its place
    places = [pool[round(value, 9)] for value in z.flatten().tolist()]
    assert places == [(k, i) for k in range(num_samples) for i in range(total)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ten_million_normals_are_distributed_as_normals(dtype, device, interpreted):
    count = 20_000 if interpreted else 10_000_000
    z = (
        normals((1000, count // 1000), device, NoiseKey(20240501), dtype)
        .cpu()
        .double()
        .flatten()
        .numpy()
    )
    # Moments of n draws: the standard errors are 1/sqrt(n), sqrt(2/n), sqrt(15/n), sqrt(96/n). Five
    # of them.
    n = len(z)
    for value, expected, error in (
        (z.mean(), 0, 1),
        (z.var(), 1, math.sqrt(2)),
        ((z**3).mean(), 0, math.sqrt(15)),
        ((z**4).mean(), 3, math.sqrt(96)),
    ):
        assert abs(value - expected) < 5 * error / math.sqrt(n)
    z.sort()
    cdf = scipy.stats.norm.cdf(z)
    steps = np.arange(n + 1) / n
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance < 1.95 / math.sqrt(n)  # exceeded with probability 1e-3 if z is normal
    assert np.abs(z).max() <= math.sqrt(66 * math.log(2))


def test_lanes_rows_samples_and_streams_are_uncorrelated(device, interpreted):
    rows, event = (64, 64) if interpreted else (512, 2048)
    key = NoiseKey(7)
    z = normals((rows, event), device, key, num_samples=2).cpu().double()
    others = {
        "the next lane": (z[0, :, :-1], z[0, :, 1:]),
        "the lane after it": (z[0, :, :-2], z[0, :, 2:]),
        "the next counter": (z[0, :, :-4], z[0, :, 4:]),
        "the next row": (z[0, :-1], z[0, 1:]),
        "the next sample": (z[0], z[1]),
        "the next stream": (
            z[0],
            normals((rows, event), device, NoiseKey(7, stream=1)).cpu().double(),
        ),
        "the next seed": (z[0], normals((rows, event), device, NoiseKey(8)).cpu().double()),
        "fold_in(0)": (z[0], normals((rows, event), device, key.fold_in(0)).cpu().double()),
        "fold_in(1)": (
            normals((rows, event), device, key.fold_in(0)).cpu().double(),
            normals((rows, event), device, key.fold_in(1)).cpu().double(),
        ),
    }
    for name, (a, b) in others.items():
        n = a.numel()
        for f in (lambda t: t, lambda t: t * t - 1):  # squares too: radii must not be shared
            correlation = (f(a) * f(b)).mean() / (f(a).std() * f(b).std())
            assert abs(correlation) < 5 / math.sqrt(n), f"correlated with {name}"


@pytest.mark.parametrize("event", [(4,), (7,), (3, 5), (1,), (2, 3, 3), (130,)], ids=str)
@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
def test_a_shard_draws_its_rows_of_the_whole(start, event, device):
    key = NoiseKey(31, stream=2)
    whole = normals((9, *event), device, key)
    assert torch.equal(normals((9 - start, *event), device, key.rows(start)), whole[start:])
    assert torch.equal(
        normals((2, *event), device, key.rows(1).rows(start)), whole[start + 1 : start + 3]
    )


def test_a_step_over_any_number_of_ranks_is_the_same_step(device):
    """One device or three: the same z, the same KL, the same gradients."""
    inputs = [leaf(9, 7, device=device) for _ in range(2)]
    key = NoiseKey(5)
    z, kl = reparameterize_kl(*inputs, key=key)
    grads = torch.autograd.grad(z.square().sum() + kl.sum(), inputs)
    for rank in range(3):
        part = slice(3 * rank, 3 * rank + 3)
        shard = [t.detach()[part].requires_grad_() for t in inputs]
        z_shard, kl_shard = reparameterize_kl(*shard, key=key.rows(3 * rank))
        grads_shard = torch.autograd.grad(z_shard.square().sum() + kl_shard.sum(), shard)
        torch.testing.assert_close(z_shard, z[part], rtol=0, atol=0)
        torch.testing.assert_close(kl_shard, kl[part], rtol=1e-6, atol=0)
        for a, b in zip(grads_shard, grads):
            torch.testing.assert_close(a, b[part], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("event", [(4,), (7,), (130,)], ids=str)
def test_more_samples_extend_fewer_and_the_first_is_the_single_one(event, device):
    key = NoiseKey(17)
    three = normals((5, *event), device, key, num_samples=3)
    assert torch.equal(normals((5, *event), device, key, num_samples=2), three[:2])
    assert torch.equal(normals((5, *event), device, key), three[0])
    assert not torch.equal(three[0], three[1])


@pytest.mark.parametrize("row_offset", [2**31 - 1, 2**32 - 2, 2**32 + 1, 2**40, (2**63 - 1) // 60])
def test_row_offsets_beyond_32_bits_go_on_where_they_should(row_offset, device):
    for event in (3, 8, 60):
        eps = normals((3, event), device, NoiseKey(1, row_offset=row_offset))
        expected = truth.normals((3, event), 1, row_offset=row_offset)
        assert_within(eps, expected, NORMALS[torch.float32] * (1 + expected.abs()))


def test_a_position_beyond_32_bits_inside_one_tensor(device):
    """Elements on both sides of counter 2**32, where the low word turns over."""
    row_offset = 2**34 // 5 - 2
    eps = normals((6, 5), device, NoiseKey(3, row_offset=row_offset))
    expected = truth.normals((6, 5), 3, row_offset=row_offset)
    assert_within(eps, expected, NORMALS[torch.float32] * (1 + expected.abs()))


@pytest.mark.parametrize("stream", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63), 123456789012345])
def test_every_seed_and_stream_gives_the_contract_noise(seed, stream, device):
    eps = normals((2, 6), device, NoiseKey(seed, stream))
    expected = truth.normals((2, 6), seed, stream)
    assert_within(eps, expected, NORMALS[torch.float32] * (1 + expected.abs()))
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert torch.equal(
        eps, normals((2, 6), device, NoiseKey(torch.tensor(signed, device=device), stream))
    )


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("shape", [(5, 7), (3, 130), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["seed number", "seed tensor"])
def test_the_noise_of_backward_is_that_of_forward(as_tensor, shape, num_samples, device):
    """d z / d logvar = (z - mean) / 2, element by element, bit by bit of the normals."""
    seed = torch.tensor(-42, device=device) if as_tensor else -42
    key = NoiseKey(seed, stream=9, row_offset=2**33 + 1)
    mean = torch.zeros(shape, device=device, requires_grad=True)
    logvar = torch.zeros(shape, device=device, requires_grad=True)
    z = reparameterize(mean, logvar, key=key, num_samples=num_samples)
    for k in range(num_samples or 1):
        upstream = torch.zeros_like(z)
        (upstream[k] if num_samples else upstream).fill_(1.0)
        (grad,) = torch.autograd.grad(z, logvar, upstream, retain_graph=True)
        assert torch.equal(2 * grad, z[k] if num_samples else z)


def test_half_precision_draws_the_noise_of_float32(device):
    key = NoiseKey(2)
    full = normals((5, 33), device, key)
    assert torch.equal(normals((5, 33), device, key, torch.float16), full.half())


@pytest.mark.kernels
def test_normals_agree_with_the_reference_on_every_backend(device):
    key = NoiseKey(123, stream=6, row_offset=3)
    for dtype in (torch.float32, torch.float64):
        expected = reference.normals(key, torch.Size((9, 77)), dtype, 2).double()
        assert_within(
            normals((9, 77), device, key, dtype, num_samples=2),
            expected,
            NORMALS[dtype] * (1 + expected.abs()),
        )
