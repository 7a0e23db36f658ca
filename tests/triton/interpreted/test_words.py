"""Philox's words against Random123's known answers, and their normals against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fused_elbo import reference
from fused_elbo.noise import NoiseKey
from fused_elbo.triton import latent_operations
from fused_elbo.triton.noise import box_muller_32, box_muller_64

# counter, key, words: philox4x32 with 10 rounds in Random123's kat_vectors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    v = low | high << 32
    return v - (1 << 64) if v >= 1 << 63 else v


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_words_are_those_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    first, sample, stream = signed(*counter[:2]), counter[2], counter[3]
    got = latent_operations.noise_words(torch.tensor(signed(*key)), stream, sample, first, 1)
    assert got.tolist() == [list(words)]


def test_words_are_those_of_the_reference_across_the_low_counter_word() -> None:
    key = NoiseKey(seed=-(2**63) + 12345, stream=2**32 - 1)
    first = 2**32 - 700
    got = latent_operations.noise_words(torch.tensor(key.seed), key.stream, 7, first, 1500)
    assert torch.equal(got, reference.philox_words(key, 7, first, 1500))


@pytest.mark.parametrize("data", [0, 1, -1, 2**62, -(2**63)])
def test_folded_seeds_are_those_of_the_reference(data: int) -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63), 42):
        s = torch.tensor(seed)
        assert torch.equal(latent_operations.fold_seed(s, data), reference.fold_seed(s, data))


@triton.jit
def pairs_kernel(
    even_ptr, odd_ptr, first_ptr, second_ptr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    even, odd = tl.load(even_ptr + i).to(tl.uint32), tl.load(odd_ptr + i).to(tl.uint32)
    if DOUBLE:
        first, second = box_muller_64(even, odd)
    else:
        first, second = box_muller_32(even, odd)
    tl.store(first_ptr + i, first)
    tl.store(second_ptr + i, second)


def hard_words() -> tuple[np.ndarray, np.ndarray]:
    """The ends of both ranges, quarter turns, and a sweep over every magnitude of the radius; all
    against random ones.
    """
    top = 2**32
    edges = [
        0,
        1,
        2,
        127,
        128,
        129,
        top - 1,
        top - 128,
        top - 129,
        top - 256,
        top - 257,
        top - 384,
        top - 385,
    ]
    edges += [top // 4 * k + d for k in (1, 2, 3) for d in (-257, -1, 0, 1, 257)]
    edges += [1 << k for k in range(32)] + [top - (1 << k) for k in range(32)]
    edges += [int(top * (0.5**0.5 + d)) for d in (-1e-6, 0.0, 1e-6)]
    rng = np.random.default_rng(0)
    grid = np.array(np.meshgrid(edges, edges)).reshape(2, -1)
    free = rng.integers(0, top, (2, 1 << 18))
    words = np.concatenate([grid, free], axis=1)
    words = words[:, : words.shape[1] // 8192 * 8192]
    return words[0], words[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_within_their_bound_at_every_magnitude(dtype: torch.dtype) -> None:
    even, odd = (torch.from_numpy(w).contiguous() for w in hard_words())
    first, second = (
        torch.full(even.shape, torch.nan, dtype=dtype),
        torch.full(even.shape, torch.nan, dtype=dtype),
    )
    pairs_kernel[(len(even) // 8192,)](
        even, odd, first, second, DOUBLE=dtype == torch.float64, BLOCK=8192
    )
    u = reference.uniforms(torch.stack([even, odd], 1), dtype).numpy().astype(np.longdouble)
    radius, angle = (
        np.sqrt(np.maximum(-2 * np.log(u[:, 0]), 0)),
        2 * np.longdouble("3.14159265358979323846") * u[:, 1],
    )
    # The interpreter rounds square roots to nearest. On NVIDIA, sqrt.approx in float32 may be off
    # by another 2**-23 of its value (PTX ISA, sqrt), and so may the normal.
    bound, root = (4e-7, 2.0**-23) if dtype == torch.float32 else (2e-15, 0.0)
    for got, exact in ((first, radius * np.cos(angle)), (second, radius * np.sin(angle))):
        error = np.abs(got.numpy().astype(np.longdouble) - exact) + root * np.abs(exact)
        assert (error / (1 + np.abs(exact))).max() < bound
