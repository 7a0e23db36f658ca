"""Sampling and KL of the latent, forward and backward.

    z = mean + exp(logvar / 2) eps
    KL(q || N(0, I)) = 1/2 sum [mean**2 + phi(logvar)]
    KL(q || p) = 1/2 sum [phi(logvar - prior_logvar) + (mean - prior_mean)**2 exp(-prior_logvar)]
    phi(x) = exp(x) - 1 - x

Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114. Forward reads mean and
logvar and writes z: 12 bytes per float32 element. Backward draws eps again and moves 20. What is
absent (prior, scale parametrization, clamp, mask, z, KL, samples) is absent from the compiled code:
one kernel, compile-time policies. A plain scale (code 0) is logvar itself, with a hard clamp of the
posterior's own.

A row is processed in groups of LANES elements that begin where the flat index of the noise contract
is a multiple of LANES, so that each Philox counter is computed once. Where LANES does not divide
the event, a row's first group starts up to LANES - 1 elements before the row.
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl

from .formulas import clamp, expm1_of_double, exponential, exponentials, from_bits
from .noise import load_key, normals
from .scale import PLAIN, scale_numbers, scale_terms, through
from .tiles import (
    CONSTANT,
    NONE,
    OFF,
    SAMPLE,
    TOTAL,
    add_columns,
    counted,
    first_row,
    kept,
    kernel,
    load,
    row_start,
    store,
    tile_at,
)


@triton.jit
def locate(
    program,
    row_offset,
    rows,
    event,
    iterations,
    splits,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ALIGNED: tl.constexpr,
):
    """Where a program works: its rows, the event element and noise group it begins at, and the
    valid range of m.

    All are [ROWS, 1]: row and begin int64, group uint64, low and high int32.
    """
    row = first_row(program, splits, ROWS)
    start = (program % splits) * iterations * WIDTH
    position = (row_offset + row) * event
    begin = tl.zeros_like(position) + start
    if not LANE_ALIGNED:
        begin = begin - (position & (LANES - 1))
    group = (position + begin).to(tl.uint64, bitcast=True) // LANES
    length = (iterations * WIDTH).to(tl.int64)
    high = tl.where(row < rows, tl.minimum(event - begin, length), 0).to(tl.int32)
    low = tl.maximum(-begin, 0).to(tl.int32)
    return row, begin, group, low, high


@triton.jit
def noise_groups(group, i, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """The noise groups of tile i, [ROWS, WIDTH / LANES]."""
    PER_TILE: tl.constexpr = WIDTH // LANES
    return group + (i * PER_TILE + tl.arange(0, PER_TILE)[None, :]).to(tl.uint64)


@kernel
def latent_forward_kernel(
    mean_ptr,
    mean,
    logvar_ptr,
    logvar,
    prior_mean_ptr,
    prior_mean,
    prior_logvar_ptr,
    prior_logvar,
    mask_ptr,
    mask,
    z_ptr,
    z,
    kl_ptr,
    kl,
    seed_ptr,
    seed_value: tl.int64,
    noise_stream: tl.int64,
    row_offset: tl.int64,
    samples: tl.int32,
    z_sample: tl.int64,
    rows: tl.int64,
    event: tl.int64,
    inner: tl.int32,
    iterations: tl.int32,
    splits: tl.int32,
    floor: tl.int64,
    clamp_min: tl.int64,
    clamp_max: tl.int64,
    kl_scale: tl.int64,
    REDUCTION: tl.constexpr,
    SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
    FLOOR: tl.constexpr,
    BOUNDED: tl.constexpr,
    MANY_SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """z, and the KL per element, or its sums per program: [rows, splits] for SAMPLE, [programs] for
    TOTAL.
    """
    program = tl.program_id(0).to(tl.int64)
    row, begin, group, low, high = locate(
        program, row_offset, rows, event, iterations, splits, ROWS, WIDTH, LANES, LANE_ALIGNED
    )
    if z_ptr is not None:
        key = load_key(seed_ptr, seed_value, noise_stream)
    if SCALE != PLAIN:
        numbers = scale_numbers(floor, clamp_min, clamp_max, DTYPE)
    elif CLAMP:
        lowest = from_bits(clamp_min, DTYPE)
        highest = from_bits(clamp_max, DTYPE)
    scale = from_bits(kl_scale, DTYPE)
    total = tl.zeros([ROWS, WIDTH], DTYPE)

    for i in range(iterations):
        here = tile_at(begin, i, low, high, inner, WIDTH, LANES, LANE_ALIGNED)
        takes_part = counted(mask_ptr, mask, row_start(row, mask), here, MASK_ALIGNED, LANES)
        mean_tile = load(mean_ptr, mean, row_start(row, mean), here, ALIGNED, DTYPE)
        logvar_tile = load(logvar_ptr, logvar, row_start(row, logvar), here, ALIGNED, DTYPE)
        if SCALE != PLAIN:
            logvar_tile, _ = scale_terms(logvar_tile, numbers, SCALE, CLAMP, FLOOR)
        elif CLAMP:
            logvar_tile = clamp(logvar_tile, lowest, highest)
        std, _, phi = exponentials(0.5 * logvar_tile, BOUNDED)

        if REDUCTION != OFF:
            if prior_mean_ptr is not None:
                prior_mean_tile = load(
                    prior_mean_ptr, prior_mean, row_start(row, prior_mean), here, ALIGNED, DTYPE
                )
                prior_logvar_tile = load(
                    prior_logvar_ptr,
                    prior_logvar,
                    row_start(row, prior_logvar),
                    here,
                    ALIGNED,
                    DTYPE,
                )
                if SCALE != PLAIN:
                    prior_logvar_tile, _ = scale_terms(
                        prior_logvar_tile, numbers, SCALE, CLAMP, FLOOR
                    )
                _, _, phi = exponentials(0.5 * (logvar_tile - prior_logvar_tile), False)
                distance = mean_tile - prior_mean_tile
                nats = tl.fma(distance * distance, exponential(-prior_logvar_tile), phi)
            else:
                nats = tl.fma(mean_tile, mean_tile, phi)
            if REDUCTION == NONE:
                nats = kept(scale * nats, takes_part, mask_ptr)
                store(kl_ptr, kl, row_start(row, kl), here, nats, ALIGNED)
            elif SCALE != PLAIN or CLAMP or mask_ptr is not None:
                total += tl.where(takes_part, nats, 0.0)
            else:
                total += nats  # what does not exist was loaded as 0 and has KL 0

        if z_ptr is not None:
            groups = noise_groups(group, i, WIDTH, LANES)
            if MANY_SAMPLES:
                for k in range(samples):
                    index = k + tl.full([], 0, tl.int64)  # a tensor under the interpreter too
                    eps = normals(groups, index.to(tl.uint32), key, ROWS, WIDTH, LANES, DTYPE)
                    sample = kept(tl.fma(std, eps, mean_tile), takes_part, mask_ptr)
                    sample_row = index * z_sample + row_start(row, z)
                    store(z_ptr, z, sample_row, here, sample, ALIGNED)
            else:
                first = tl.full([], 0, tl.uint32)
                eps = normals(groups, first, key, ROWS, WIDTH, LANES, DTYPE)
                sample = kept(tl.fma(std, eps, mean_tile), takes_part, mask_ptr)
                store(z_ptr, z, row_start(row, z), here, sample, ALIGNED)

    if REDUCTION == SAMPLE:
        per_row = add_columns(total, ROWS, WIDTH, LANES) * scale
        tl.store(kl_ptr + (row * splits + program % splits), per_row, mask=row < rows)
    elif REDUCTION == TOTAL:
        tl.store(
            kl_ptr + program,
            tl.sum(tl.sum(add_columns(total, ROWS, WIDTH, LANES), axis=1), axis=0) * scale,
        )


@kernel
def latent_backward_kernel(
    mean_ptr,
    mean,
    logvar_ptr,
    logvar,
    prior_mean_ptr,
    prior_mean,
    prior_logvar_ptr,
    prior_logvar,
    mask_ptr,
    mask,
    grad_z_ptr,
    grad_z,
    grad_kl_ptr,
    grad_kl,
    grad_mean_ptr,
    grad_mean,
    grad_logvar_ptr,
    grad_logvar,
    grad_prior_mean_ptr,
    grad_prior_mean,
    grad_prior_logvar_ptr,
    grad_prior_logvar,
    seed_ptr,
    seed_value: tl.int64,
    noise_stream: tl.int64,
    row_offset: tl.int64,
    samples: tl.int32,
    grad_z_sample: tl.int64,
    rows: tl.int64,
    event: tl.int64,
    inner: tl.int32,
    iterations: tl.int32,
    splits: tl.int32,
    floor: tl.int64,
    clamp_min: tl.int64,
    clamp_max: tl.int64,
    kl_scale: tl.int64,
    SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
    FLOOR: tl.constexpr,
    BOUNDED: tl.constexpr,
    MANY_SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The gradients of mean, logvar and the prior from grad_z and grad_kl, either of which may be
    absent.
    """
    program = tl.program_id(0).to(tl.int64)
    row, begin, group, low, high = locate(
        program, row_offset, rows, event, iterations, splits, ROWS, WIDTH, LANES, LANE_ALIGNED
    )
    if grad_z_ptr is not None:
        key = load_key(seed_ptr, seed_value, noise_stream)
    if SCALE != PLAIN:
        numbers = scale_numbers(floor, clamp_min, clamp_max, DTYPE)
    elif CLAMP:
        lowest = from_bits(clamp_min, DTYPE)
        highest = from_bits(clamp_max, DTYPE)
    if grad_kl_ptr is not None:
        g = from_bits(kl_scale, DTYPE)
        if grad_kl.kind == CONSTANT:
            g *= tl.load(grad_kl_ptr + row_start(row, grad_kl), mask=row < rows, other=0.0).to(
                DTYPE
            )

    for i in range(iterations):
        here = tile_at(begin, i, low, high, inner, WIDTH, LANES, LANE_ALIGNED)
        takes_part = counted(mask_ptr, mask, row_start(row, mask), here, MASK_ALIGNED, LANES)
        raw_logvar = load(logvar_ptr, logvar, row_start(row, logvar), here, ALIGNED, DTYPE)
        logvar_tile = raw_logvar
        if SCALE != PLAIN:
            logvar_tile, slope = scale_terms(raw_logvar, numbers, SCALE, CLAMP, FLOOR)
        elif CLAMP:
            logvar_tile = clamp(raw_logvar, lowest, highest)
        std, less_one, _ = exponentials(0.5 * logvar_tile, BOUNDED)
        to_mean = tl.zeros([ROWS, WIDTH], DTYPE)
        to_logvar = tl.zeros([ROWS, WIDTH], DTYPE)

        if grad_z_ptr is not None:
            groups = noise_groups(group, i, WIDTH, LANES)
            if MANY_SAMPLES:
                for k in range(samples):
                    index = k + tl.full([], 0, tl.int64)  # a tensor under the interpreter too
                    eps = normals(groups, index.to(tl.uint32), key, ROWS, WIDTH, LANES, DTYPE)
                    sample_row = index * grad_z_sample + row_start(row, grad_z)
                    upstream = load(grad_z_ptr, grad_z, sample_row, here, ALIGNED, DTYPE)
                    to_mean += upstream
                    to_logvar = tl.fma(upstream, eps, to_logvar)
            else:
                first = tl.full([], 0, tl.uint32)
                eps = normals(groups, first, key, ROWS, WIDTH, LANES, DTYPE)
                to_mean = load(grad_z_ptr, grad_z, row_start(row, grad_z), here, ALIGNED, DTYPE)
                to_logvar = to_mean * eps
            to_logvar = (0.5 * std) * to_logvar

        if grad_kl_ptr is not None:
            weight = g
            if grad_kl.kind != CONSTANT:
                weight *= load(grad_kl_ptr, grad_kl, row_start(row, grad_kl), here, ALIGNED, DTYPE)
            mean_tile = load(mean_ptr, mean, row_start(row, mean), here, ALIGNED, DTYPE)
            if prior_mean_ptr is not None:
                prior_mean_tile = load(
                    prior_mean_ptr, prior_mean, row_start(row, prior_mean), here, ALIGNED, DTYPE
                )
                prior_logvar_tile = load(
                    prior_logvar_ptr,
                    prior_logvar,
                    row_start(row, prior_logvar),
                    here,
                    ALIGNED,
                    DTYPE,
                )
                if SCALE != PLAIN:
                    prior_logvar_tile, prior_slope = scale_terms(
                        prior_logvar_tile, numbers, SCALE, CLAMP, FLOOR
                    )
                distance = mean_tile - prior_mean_tile
                pull = distance * exponential(-prior_logvar_tile)
                _, less_one, _ = exponentials(0.5 * (logvar_tile - prior_logvar_tile), False)
                excess = expm1_of_double(less_one)
            else:
                pull = mean_tile
                excess = expm1_of_double(less_one)
            to_mean = tl.fma(weight, pull, to_mean)
            to_logvar = tl.fma(0.5 * weight, excess, to_logvar)
            if grad_prior_mean_ptr is not None:
                to_prior_mean = kept(-weight * pull, takes_part, mask_ptr)
                to_prior_logvar = (-0.5 * weight) * tl.fma(distance, pull, excess)
                if SCALE != PLAIN:
                    to_prior_logvar = through(prior_slope, to_prior_logvar)
                to_prior_logvar = kept(to_prior_logvar, takes_part, mask_ptr)
                store(
                    grad_prior_mean_ptr,
                    grad_prior_mean,
                    row_start(row, grad_prior_mean),
                    here,
                    to_prior_mean,
                    ALIGNED,
                )
                store(
                    grad_prior_logvar_ptr,
                    grad_prior_logvar,
                    row_start(row, grad_prior_logvar),
                    here,
                    to_prior_logvar,
                    ALIGNED,
                )

        if SCALE != PLAIN:
            to_logvar = through(slope, to_logvar)
        elif CLAMP:
            to_logvar = tl.where((raw_logvar >= lowest) & (raw_logvar <= highest), to_logvar, 0.0)
        to_mean = kept(to_mean, takes_part, mask_ptr)
        to_logvar = kept(to_logvar, takes_part, mask_ptr)
        store(grad_mean_ptr, grad_mean, row_start(row, grad_mean), here, to_mean, ALIGNED)
        store(grad_logvar_ptr, grad_logvar, row_start(row, grad_logvar), here, to_logvar, ALIGNED)
