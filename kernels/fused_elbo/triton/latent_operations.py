"""The raw operations on the latent: outputs allocated, arguments laid out, kernels launched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parametrization import PLAIN, ScaleParams
from ..reference import accumulate_dtype
from ..schemas import BATCHMEAN, FAKES, NO_CLAMP, NONE, OFF, SAMPLE, halves
from .formulas import BOUNDED_HALF_LOGVAR
from .geometry import Arrangement, Division, arrange, divide, lanes
from .latent import latent_backward_kernel, latent_forward_kernel
from .launch import (
    Sums,
    bits,
    empty_sum,
    kernel_reduction,
    launch,
    mask_bytes,
    operand,
    scale_arguments,
    triton_dtype,
)
from .noise import fold_seed_kernel, noise_words_kernel


def latent_forward(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None = None,
    seed_value: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    num_samples: int = 0,
    chunk_dim: int = -1,
    scale: int = PLAIN,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
    want_z: bool = True,
    reduction: int = SAMPLE,
) -> tuple[Tensor, Tensor]:
    z, kl = FAKES["latent_forward"](
        mean, logvar, prior_mean, prior_logvar, seed, mask, seed_value, stream, row_offset,
        num_samples, chunk_dim, scale, floor, clamp_min, clamp_max, want_z, reduction,
    )  # fmt: skip
    mean, logvar = halves(mean, logvar, chunk_dim)
    if mean.numel() == 0:
        return z, empty_sum(kl, mean.shape[0], reduction)

    arranged = arrange(
        {
            "mean": mean[None],
            "logvar": logvar[None],
            "prior_mean": _lead(prior_mean),
            "prior_logvar": _lead(prior_logvar),
            "mask": _lead(mask_bytes(mask)),
            "z": None if not want_z else z if num_samples else z[None],
            "kl": kl[None] if reduction == NONE else None,
        },
        frozenset({"z", "kl"}),
        lanes(mean.dtype),
        samples_apart=True,
    )
    division = divide(arranged.event, lanes(mean.dtype))
    kl_scale = 0.5 / mean.shape[0] if reduction == BATCHMEAN else 0.5
    sums = Sums(kl, reduction, arranged.rows, division)
    tensors = {**arranged.tensors, "kl": sums.parts} if sums.parts is not None else arranged.tensors
    launch(
        latent_forward_kernel,
        division.programs(arranged.rows),
        mean.device,
        **_operands(tensors, arranged),
        **_numbers(arranged, division, seed, seed_value, stream, row_offset, num_samples),
        z_sample=arranged.sample_strides["z"],
        kl_scale=bits(kl_scale),
        REDUCTION=kernel_reduction(reduction),
        **_scale(ScaleParams(scale, floor, clamp_min, clamp_max)),
        MANY_SAMPLES=num_samples > 1,
        **_tile(arranged, division, mean.dtype),
    )
    sums.finish()
    arranged.finish()
    return z, kl


def latent_backward(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None = None,
    seed_value: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    num_samples: int = 0,
    chunk_dim: int = -1,
    scale: int = PLAIN,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
    reduction: int = SAMPLE,
    want_prior: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = FAKES["latent_backward"](
        mean, logvar, prior_mean, prior_logvar, grad_z, grad_kl, seed, mask, seed_value, stream,
        row_offset, num_samples, chunk_dim, scale, floor, clamp_min, clamp_max, reduction,
        want_prior,
    )  # fmt: skip
    if mean.numel() == 0:
        return grads
    grad_mean, grad_logvar = halves(grads[0], None if logvar is None else grads[1], chunk_dim)
    mean, logvar = halves(mean, logvar, chunk_dim)
    has_prior = want_prior and prior_mean is not None
    if reduction == OFF:
        grad_kl = None
    elif grad_kl is not None and reduction != NONE:
        grad_kl = grad_kl.reshape(grad_kl.shape + (1,) * (mean.dim() - grad_kl.dim())).expand(
            mean.shape
        )
    if grad_z is not None and not num_samples:
        grad_z = grad_z[None]

    arranged = arrange(
        {
            "mean": mean[None],
            "logvar": logvar[None],
            "prior_mean": _lead(prior_mean),
            "prior_logvar": _lead(prior_logvar),
            "mask": _lead(mask_bytes(mask)),
            "grad_z": grad_z,
            "grad_kl": _lead(grad_kl),
            "grad_mean": grad_mean[None],
            "grad_logvar": grad_logvar[None],
            "grad_prior_mean": grads[2][None] if has_prior else None,
            "grad_prior_logvar": grads[3][None] if has_prior else None,
        },
        frozenset({"grad_mean", "grad_logvar", "grad_prior_mean", "grad_prior_logvar"}),
        lanes(mean.dtype),
        samples_apart=True,
    )
    if grad_kl is None:  # without a KL to differentiate, the prior has no gradient and is not read
        for name in ("grad_prior_mean", "grad_prior_logvar"):
            arranged.tensors[name] = None
        grads[2].zero_()
        grads[3].zero_()
    division = divide(arranged.event, lanes(mean.dtype))
    launch(
        latent_backward_kernel,
        division.programs(arranged.rows),
        mean.device,
        **_operands(arranged.tensors, arranged),
        **_numbers(arranged, division, seed, seed_value, stream, row_offset, num_samples),
        grad_z_sample=arranged.sample_strides["grad_z"],
        kl_scale=bits(1.0 / mean.shape[0] if reduction == BATCHMEAN else 1.0),
        **_scale(ScaleParams(scale, floor, clamp_min, clamp_max)),
        MANY_SAMPLES=num_samples > 1,
        **_tile(arranged, division, mean.dtype),
    )
    arranged.finish()
    return grads


def _lead(t: Tensor | None) -> Tensor | None:
    return None if t is None else t[None]


def _operands(tensors: dict[str, Tensor | None], arranged: Arrangement) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        arguments.update(operand(name, tensor, arranged.layouts[name]))
    return arguments


def _numbers(
    arranged: Arrangement,
    division: Division,
    seed: Tensor | None,
    seed_value: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    num_samples: int = 0,
) -> dict[str, object]:
    return {
        "seed_ptr": seed,
        "seed_value": seed_value,
        "noise_stream": stream,
        "row_offset": row_offset,
        "samples": max(num_samples, 1),
        "rows": arranged.rows,
        "event": arranged.event,
        "inner": arranged.inner,
        "iterations": division.iterations,
        "splits": division.splits,
    }


def _scale(scale: ScaleParams) -> dict[str, object]:
    arguments = scale_arguments(scale)
    largest = 2 * BOUNDED_HALF_LOGVAR
    bounded = -largest <= scale.clamp_min and scale.clamp_max <= largest
    return {**arguments, "BOUNDED": scale.code == PLAIN and arguments["CLAMP"] and bounded}


def _tile(arranged: Arrangement, division: Division, dtype: torch.dtype) -> dict[str, object]:
    return {
        "ROWS": division.rows,
        "WIDTH": division.width,
        "LANES": lanes(dtype),
        "LANE_ALIGNED": arranged.event % lanes(dtype) == 0,
        "ALIGNED": arranged.aligned,
        "MASK_ALIGNED": arranged.mask_aligned,
        "DTYPE": triton_dtype(accumulate_dtype(dtype)),
    }


def fold_seed(seed: Tensor, data: int) -> Tensor:
    out = torch.empty_like(seed)
    launch(fold_seed_kernel, 1, seed.device, seed_ptr=seed, out_ptr=out, data=data)
    return out


def noise_words(seed: Tensor, stream: int, sample: int, first: int, count: int) -> Tensor:
    words = seed.new_empty((count, 4))
    if count:
        launch(
            noise_words_kernel,
            -(-count // _WORDS_BLOCK),
            seed.device,
            seed_ptr=seed,
            words_ptr=words,
            noise_stream=stream,
            sample=sample,
            first=first,
            count=count,
            BLOCK=_WORDS_BLOCK,
        )
    return words


_WORDS_BLOCK = 512
