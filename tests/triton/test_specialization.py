"""What makes Triton compile again: asked of Triton's own specialization, for launches as a training
run makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature

from fused_elbo.schemas import BATCHMEAN, SAMPLE
from fused_elbo.triton import latent_operations, launch, likelihood_operations

FREE = (-math.inf, math.inf)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


SEED = meta(dtype=torch.int64)


def keys(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """Kernel and specialization of every launch: Triton compiles once for each."""
    with launch.recording() as launches:
        call()
    found = []
    for one in launches:
        bind = create_function_from_signature(one.kernel.signature, one.kernel.params, BaseBackend)
        _, specialization, _ = bind(**one.args)
        found.append((one.kernel.fn.__name__, str(specialization)))
    return found


def latent(
    batch: int,
    event: int,
    *,
    samples: int = 0,
    row_offset: int = 0,
    value: int = 0,
    seed: Tensor | None = SEED,
):
    mean = meta(batch, event)
    common = (mean, mean, None, None)
    numbers = (seed, value, 3, row_offset, samples, -1, *FREE)
    grad_z = meta(samples, batch, event) if samples else mean
    return keys(lambda: latent_operations.latent_forward(*common, *numbers, True, SAMPLE)) + keys(
        lambda: latent_operations.latent_backward(
            *common, grad_z, meta(batch), *numbers, SAMPLE, False
        )
    )


BATCHES = [1, 2, 3, 16, 63, 64, 1000, 40000]


@pytest.mark.parametrize("event", [7, 64, 1000, 16384, 65536 + 2])
@pytest.mark.parametrize("samples", [0, 5])
def test_a_changed_batch_size_compiles_nothing(event: int, samples: int) -> None:
    expected = latent(BATCHES[0], event, samples=samples)
    assert expected
    for batch in BATCHES[1:]:
        assert latent(batch, event, samples=samples) == expected


def test_no_value_of_seed_row_offset_or_number_of_samples_compiles_anything() -> None:
    expected = latent(8, 64, seed=None, value=0, samples=2)
    for value in (1, 16, -1, 2**62):
        assert latent(8, 64, seed=None, value=value, samples=2) == expected
    for row_offset in (1, 16, 17, 2**40):
        assert latent(8, 64, seed=None, row_offset=row_offset, samples=2) == expected
    assert latent(8, 64, seed=None, samples=16) == expected


def test_rows_longer_than_a_tile_share_their_kernels() -> None:
    main = [key for key in latent(8, 16384) if key[0].startswith("latent")]
    for event in (2048, 12288, 65536, 10**6, 2**31 + 1024):
        longer = [key for key in latent(2, event) if key[0].startswith("latent")]
        assert [name for name, _ in longer] == [name for name, _ in main]
        # Row strides of 2**31 and more are 64 bits wide: one more variant, at 8 GiB a row.
        assert longer == main or event > 2**31


@pytest.mark.parametrize("event", [(1, 28, 28), (3, 256, 256)])
def test_a_changed_batch_size_compiles_no_likelihood(event: tuple[int, ...]) -> None:
    def run(batch: int) -> list[tuple[str, str]]:
        x, latent_mean, channel = meta(batch, *event), meta(batch, 32), meta(event[0], 1, 1)
        found = keys(
            lambda: likelihood_operations.likelihood_forward(x, x, channel, 0.0, 1, SAMPLE)
        )
        found += keys(
            lambda: likelihood_operations.likelihood_backward(
                x, x, channel, 0.0, 1, SAMPLE, meta(batch), True, True
            )
        )
        found += keys(
            lambda: likelihood_operations.elbo_forward(
                x, x, None, 0.0, latent_mean, latent_mean, None, None, 1.0, BATCHMEAN, True
            )
        )
        # Large batches add up in one more round; what is compiled for it is the same for all of
        # them.
        return [key for key in found if key[0] != "add_blocks_kernel"]

    expected = run(2)
    for batch in BATCHES[2:]:
        assert run(batch) == expected


def test_what_changes_the_code_changes_the_key() -> None:
    dense = latent(8, 64)
    assert latent(8, 65) != dense  # ragged rows
    assert latent(8, 256) != dense  # another width of the tile
    assert latent(8, 64, samples=3) != dense
    assert latent(8, 64, seed=None) != dense


def test_the_alignment_of_a_tensor_matters_only_through_the_width_of_the_loads() -> None:
    wide = meta(8, 80)

    def run(mean: Tensor) -> list[tuple[str, str]]:
        numbers = (SEED, 0, 0, 0, 0, -1, *FREE)
        return keys(
            lambda: latent_operations.latent_forward(mean, mean, None, None, *numbers, True, SAMPLE)
        )

    assert run(wide[:, 1:65]) == run(wide[:, 2:66]) == run(wide[:, 3:67])
    assert run(wide[:, 4:68]) == run(wide[:, :64])
    assert run(wide[:, 4:68]) != run(wide[:, 1:65])
