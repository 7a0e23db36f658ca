"""NoiseKey: folding, sharding, and what happens without a key."""

import copy
import pickle

import pytest
import torch

from fused_elbo import DiagonalGaussian, NoiseKey, reparameterize, reparameterize_kl

MASK = (1 << 64) - 1


def drawn(device, **options):
    zeros = torch.zeros(4, 9, device=device)
    return reparameterize(zeros, zeros, **options)


def folded(seed, *data):
    """fold_in in Python's integers, with the finalizer of splitmix64."""

    def mix(v):
        v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & MASK
        return v ^ (v >> 31)

    for d in data:
        seed = mix((mix((seed + 0x9E3779B97F4A7C15) & MASK) + d * 0x9E3779B97F4A7C15) & MASK)
    return seed - (1 << 64) if seed >= 1 << 63 else seed


SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
DATA = [0, 1, 2, -1, 2**32, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_tensor_folds_as_a_number_does(seed, device):
    for data in DATA:
        number = NoiseKey(seed).fold_in(data)
        tensor = NoiseKey(torch.tensor(seed, device=device)).fold_in(data)
        assert tensor.seed.device.type == device.type
        assert number.seed == tensor.seed.item() == folded(seed, data)
        assert torch.equal(drawn(device, key=number), drawn(device, key=tensor))


def test_folds_are_distinct_and_their_order_matters():
    key = NoiseKey(5)
    seeds = {key.fold_in(i).seed for i in range(1000)} | {key.seed}
    assert len(seeds) == 1001
    assert key.fold_in(1).fold_in(2) == NoiseKey(folded(5, 1, 2))
    assert key.fold_in(1).fold_in(2) != key.fold_in(2).fold_in(1)
    assert NoiseKey(5).fold_in(6) != NoiseKey(6).fold_in(5)


def test_fold_in_and_rows_keep_each_others_effect(device):
    key = NoiseKey(5, stream=3)
    assert (
        key.fold_in(7).rows(4)
        == key.rows(4).fold_in(7)
        == NoiseKey(folded(5, 7), stream=3, row_offset=4)
    )
    assert key.rows(4).rows(5).row_offset == 9
    whole = drawn(device, key=key.fold_in(7))
    zeros = torch.zeros(2, 9, device=device)
    assert torch.equal(reparameterize(zeros, zeros, key=key.rows(2).fold_in(7)), whole[2:])


def test_keys_are_values(device):
    key = NoiseKey(1, 2, 3)
    assert key == NoiseKey(1, 2, 3)
    assert hash(key) == hash(NoiseKey(1, 2, 3))
    assert pickle.loads(pickle.dumps(key)) == copy.deepcopy(key) == key
    with pytest.raises(AttributeError):
        key.seed = 4
    tensor = NoiseKey(torch.tensor(6, device=device))
    assert torch.equal(drawn(device, key=copy.deepcopy(tensor)), drawn(device, key=NoiseKey(6)))


def test_manual_seed_reproduces_and_successive_calls_differ(device):
    torch.manual_seed(4)
    first, second = drawn(device), drawn(device)
    torch.manual_seed(4)
    assert torch.equal(drawn(device), first)
    assert torch.equal(drawn(device), second)
    assert not torch.equal(first, second)


def test_one_call_takes_one_draw_of_its_generator(device):
    torch.manual_seed(4)
    drawn(device)
    after = torch.rand(3, device=device)
    torch.manual_seed(4)
    torch.empty((), dtype=torch.int64, device=device).random_()
    assert torch.equal(after, torch.rand(3, device=device))


def test_a_generator_of_ones_own_leaves_the_global_one_alone(device):
    generator = torch.Generator(device).manual_seed(9)
    before = torch.get_rng_state()
    first, second = drawn(device, generator=generator), drawn(device, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    generator.manual_seed(9)
    zeros = torch.zeros(4, 9, device=device)
    assert torch.equal(DiagonalGaussian(zeros, zeros).rsample(generator=generator), first)
    assert torch.equal(reparameterize_kl(zeros, zeros, generator=generator)[0], second)


def test_the_seed_drawn_is_the_seed_used(device):
    """No key: the noise is that of NoiseKey(seed) with the seed that random_ gives."""
    torch.manual_seed(4)
    z = drawn(device)
    torch.manual_seed(4)
    seed = torch.empty((), dtype=torch.int64, device=device).random_()
    assert torch.equal(z, drawn(device, key=NoiseKey(seed)))


def test_a_seed_tensor_is_read_when_the_kernel_runs(device):
    """Not when the key is made: what CUDA graphs and compiled steps rely on."""
    seed = torch.tensor(1, device=device)
    key = NoiseKey(seed)
    assert torch.equal(drawn(device, key=key), drawn(device, key=NoiseKey(1)))
    seed.fill_(2)
    assert torch.equal(drawn(device, key=key), drawn(device, key=NoiseKey(2)))
