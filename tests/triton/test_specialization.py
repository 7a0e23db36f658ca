"""What makes Triton compile again: asked of Triton's own specialization, for launches as a training
run makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature

from fused_elbo.parametrization import SOFT, SOFTPLUS_STD
from fused_elbo.schemas import BATCHMEAN, NONE, SAMPLE, SUM, nats_like
from fused_elbo.triton import elbo_operations, latent_operations, launch, likelihood_operations


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
    numbers = (seed, None, value, 3, row_offset, samples)
    grad_z = meta(samples, batch, event) if samples else mean
    return keys(lambda: latent_operations.latent_forward(*common, *numbers)) + keys(
        lambda: latent_operations.latent_backward(*common, grad_z, meta(batch), *numbers)
    )


#: One, around a multiple of 16 (what Triton specializes on), a full tile of short rows, and beyond.
BATCHES = [1, 2, 3, 15, 16, 17, 64, 1000, 40000]


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
        # Row strides of 2**27 and more are 64 bits wide on their way: one more variant.
        assert longer == main or event > 2**27


def every_operation(
    batch: int, event: tuple[int, ...], latent_event: int, dtype: torch.dtype, reduction: int
) -> dict[str, list[tuple[str, str]]]:
    """The keys of every raw operation with every form of its optional arguments."""
    image, mean = meta(batch, *event, dtype=dtype), meta(batch, latent_event, dtype=dtype)
    moments = meta(batch, 8, 4, 4, dtype=dtype)
    image_nats, nats, moments_nats = (
        nats_like(t, 1, reduction) for t in (image, mean, moments[:, :4])
    )
    latents, likelihoods = latent_operations, likelihood_operations
    found = {}
    frames = meta(batch, 1, *event[1:], dtype=torch.bool).expand(image.shape)
    softplus = {"scale": SOFTPLUS_STD + SOFT, "floor": 1e-3, "clamp_min": -4.0, "clamp_max": 4.0}
    variances: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
        "unit variance": (None, {}),
        "one variance": (meta(dtype=dtype), {}),
        "variance per channel": (meta(event[0], 1, 1, dtype=dtype), {}),
        "variance per pixel": (meta(*event[1:], dtype=dtype), {}),
        "variance per element": (image, {}),
        "softplus": (image, softplus),
        "mask": (None, {"mask": frames}),
    }
    for name, (logvar, policies) in variances.items():
        found[f"{name}, forward"] = keys(
            lambda logvar=logvar, policies=policies: likelihoods.likelihood_forward(
                image, image, logvar, reduction=reduction, **policies
            )
        )
        found[f"{name}, backward"] = keys(
            lambda logvar=logvar, policies=policies: likelihoods.likelihood_backward(
                image, image, logvar, image_nats, True, logvar is not None,
                reduction=reduction, **policies,
            )
        )  # fmt: skip
        for kl in (None, nats_like(image, 1, SAMPLE)):
            latent = (mean, mean) if kl is None else (None, None)
            given = (image, image, logvar, 0.0, *latent, kl, None, 1.0, reduction, True)
            found[f"elbo, {name}, {'KL given' if kl is not None else 'posterior'}"] = keys(
                lambda given=given, policies=policies: elbo_operations.elbo_forward(
                    *given, **policies
                )
            )
    each = meta(batch, latent_event, dtype=torch.bool)
    posteriors: list[tuple[str, Tensor | None, int, dict[str, Any]]] = [
        ("no prior, 0 samples", None, 0, {}),
        ("no prior, 5 samples", None, 5, {}),
        ("prior, 0 samples", mean, 0, {}),
        ("prior, 5 samples", mean, 5, {}),
        ("softplus", None, 0, softplus),
        ("mask", None, 0, {"mask": each}),
    ]
    for name, prior, samples, policies in posteriors:
        inputs = (mean, mean, prior, prior)
        given = {"stream": 3, "num_samples": samples, "reduction": reduction, **policies}
        grad_z = meta(samples, batch, latent_event, dtype=dtype) if samples else mean
        found[f"latent, {name}, forward"] = keys(
            lambda inputs=inputs, given=given: latents.latent_forward(*inputs, SEED, **given)
        )
        found[f"latent, {name}, backward"] = keys(
            lambda inputs=inputs, given=given, grad_z=grad_z: latents.latent_backward(
                *inputs, grad_z, nats, SEED, want_prior=inputs[2] is not None, **given
            )
        )
    for layout in (torch.contiguous_format, torch.channels_last):
        here = torch.empty_like(moments, memory_format=layout)
        grad_z = torch.empty_like(here[:, :4])
        given = {"chunk_dim": 1, "clamp_min": -30.0, "clamp_max": 20.0, "reduction": reduction}
        inputs = (here, None, None, None)
        found[f"moments, {layout}, forward"] = keys(
            lambda inputs=inputs, given=given: latents.latent_forward(*inputs, SEED, **given)
        )
        found[f"moments, {layout}, backward"] = keys(
            lambda inputs=inputs, given=given, grad_z=grad_z: latents.latent_backward(
                *inputs, grad_z, moments_nats, SEED, **given
            )
        )
    return found


@pytest.mark.parametrize("reduction", [NONE, SAMPLE, SUM, BATCHMEAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("event", "latent_event"), [((1, 28, 28), 32), ((3, 256, 256), 4096), ((3, 5, 7), 7)]
)
def test_no_operation_compiles_anything_for_a_new_batch_size(
    event: tuple[int, ...], latent_event: int, dtype: torch.dtype, reduction: int
) -> None:
    expected = every_operation(2, event, latent_event, dtype, reduction)
    parts = meta(2, dtype=torch.float32)
    further_rounds = set(keys(lambda: launch.add_all(parts, parts.new_empty(()))))
    for batch in (1, 3, 16, 40000):
        for name, found in every_operation(batch, event, latent_event, dtype, reduction).items():
            # Sums over a batch take a round more where one program does not hold it: one kernel,
            # always the same.
            assert set(found) <= set(expected[name]) | further_rounds, (batch, name)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 1000])
def test_no_count_or_position_of_noise_words_compiles_anything(count: int) -> None:
    expected = keys(lambda: latent_operations.noise_words(SEED, 0, 0, 0, 1000))
    for stream, sample, first in ((0, 0, 0), (1, 1, 1), (16, 16, 16), (3, 2, 2**40)):
        numbers = (stream, sample, first, count)
        assert keys(lambda n=numbers: latent_operations.noise_words(SEED, *n)) == expected
    for data in (0, 1, 16, -1):
        assert keys(lambda d=data: latent_operations.fold_seed(SEED, d)) == keys(
            lambda: latent_operations.fold_seed(SEED, 5)
        )


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_upstream_gradients_of_one_sample_are_those_of_many(offset: int) -> None:
    """The stride of a dimension of size 1 says nothing, and may be anything."""

    def run(batch: int, nats: Tensor) -> list[tuple[str, str]]:
        mean = meta(batch, 64)
        return keys(
            lambda: latent_operations.latent_backward(mean, mean, None, None, mean, nats, SEED)
        )

    one = torch.empty_strided((1,), (offset,), device="meta")
    assert run(1, one) == run(8, meta(8)) == run(8, meta().expand(8)) == run(8, meta(8, 3)[:, 0])


def test_what_changes_the_code_changes_the_key() -> None:
    dense = latent(8, 64)
    assert latent(8, 65) != dense  # ragged rows
    assert latent(8, 256) != dense  # another width of the tile
    assert latent(8, 64, samples=3) != dense
    assert latent(8, 64, seed=None) != dense


def test_the_alignment_of_a_tensor_matters_only_through_the_width_of_the_loads() -> None:
    wide = meta(8, 80)

    def run(mean: Tensor) -> list[tuple[str, str]]:
        return keys(lambda: latent_operations.latent_forward(mean, mean, None, None, SEED))

    assert run(wide[:, 1:65]) == run(wide[:, 2:66]) == run(wide[:, 3:67])
    assert run(wide[:, 4:68]) == run(wide[:, :64])
    assert run(wide[:, 4:68]) != run(wide[:, 1:65])


def test_no_value_of_a_floor_or_clamp_compiles_anything() -> None:
    def run(**scale: float) -> list[tuple[str, str]]:
        mean = meta(8, 64)
        return keys(
            lambda: latent_operations.latent_forward(
                mean, mean, None, None, SEED, scale=SOFTPLUS_STD, **scale
            )
        )

    assert run(floor=1.0) == run(floor=1e-3)
    assert run(floor=0.0) != run(floor=1e-3)
    clamps = [run(clamp_min=low, clamp_max=1.0) for low in (-4.0, 0.0, 1.0, -1e300)]
    assert clamps == clamps[:1] * 4
    assert run() != clamps[0]


def test_a_mask_of_any_alignment_leaves_the_other_accesses_wide() -> None:
    mean, mask = meta(8, 1024), meta(8, 1032, dtype=torch.bool)
    with launch.recording() as launches:
        for start in (0, 1, 4):
            given = mask[:, start : start + 1024]
            latent_operations.latent_forward(mean, mean, None, None, SEED, given)
    assert [one.args["ALIGNED"] for one in launches] == [True] * 3
    assert [one.args["MASK_ALIGNED"] for one in launches] == [True, False, True]
