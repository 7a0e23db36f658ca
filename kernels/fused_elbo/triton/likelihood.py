"""The Gaussian log-likelihood and its gradients, in one reading of x and the mean.

    log N(x; mean, exp(logvar)) = -1/2 [(x - mean)**2 exp(-logvar) + logvar + ln 2 pi]

A "row" here is what shares one value in the sums: a sample, or a channel of a sample where logvar
is constant over the rest of the event. Then the gradient of logvar is one number per row and
program, and the log-likelihood of a sample is summed over its channels in the second stage. Rows
are numbered over [samples, batch, channels].
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: SIM102, SIM109

import triton
import triton.language as tl

from . import geometry
from .formulas import LOG_2PI, exponential, from_bits
from .scale import PLAIN, scale_numbers, scale_terms, through
from .tiles import (
    CONSTANT,
    NONE,
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
    stride,
    tile_at,
)

# What becomes of the gradient of logvar.
NOT_WANTED = tl.constexpr(geometry.NOT_WANTED)
PER_ELEMENT = tl.constexpr(geometry.PER_ELEMENT)
PER_ROW = tl.constexpr(geometry.PER_ROW)


@triton.jit
def row_offset(place, sample_stride, layout):
    """The element offset of rows, from their indices (sample, batch, channel)."""
    return (
        place[0] * sample_stride + row_start(place[1], layout) + place[2] * stride(layout.channel)
    )


@triton.jit
def likelihood_tiles(
    program,
    x_ptr,
    x,
    x_sample,
    mean_ptr,
    mean,
    mean_sample,
    logvar_ptr,
    logvar,
    logvar_sample,
    mask_ptr,
    mask,
    mask_sample,
    grad_ptr,
    grad,
    grad_sample,
    ll_ptr,
    ll,
    ll_sample,
    grad_mean_ptr,
    grad_mean,
    grad_mean_sample,
    grad_logvar_ptr,
    grad_logvar,
    grad_logvar_sample,
    logvar_value,
    floor,
    clamp_min,
    clamp_max,
    ll_scale,
    grad_scale,
    rows,
    batch,
    channels,
    event,
    inner,
    iterations,
    splits,
    REDUCTION: tl.constexpr,
    LOGVAR_GRADIENT: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What one program does. An absent (None) pointer is neither read nor written; grad absent
    stands for 1.
    """
    row = first_row(program, splits, ROWS)
    if SPLIT_ROWS:
        outer = row // channels
        place = (outer // batch, outer % batch, row % channels)
    else:
        place = (tl.zeros_like(row), row, tl.zeros_like(row))
    valid = row < rows
    split = program % splits
    begin = tl.zeros_like(row) + split * iterations * WIDTH
    length = (iterations * WIDTH).to(tl.int64)
    count = tl.where(valid, tl.minimum(event - begin, length), 0).to(tl.int32)

    x_row = row_offset(place, x_sample, x)
    mean_row = row_offset(place, mean_sample, mean)
    mask_row = row_offset(place, mask_sample, mask)
    upstream = from_bits(grad_scale, DTYPE)
    if grad_ptr is not None:
        grad_row = row_offset(place, grad_sample, grad)
        if grad.kind == CONSTANT:
            upstream *= tl.load(grad_ptr + grad_row, mask=valid, other=0.0).to(DTYPE)

    if SCALE != PLAIN:
        numbers = scale_numbers(floor, clamp_min, clamp_max, DTYPE)
    # A variance that holds for the whole row is read once, and so is its exponential.
    ROW_VARIANCE: tl.constexpr = logvar_ptr is None or logvar.kind == CONSTANT
    if logvar_ptr is None:
        log_variance = from_bits(logvar_value, DTYPE)
        inverse = exponential(-log_variance)
    else:
        logvar_row = row_offset(place, logvar_sample, logvar)
        if ROW_VARIANCE:
            log_variance = tl.load(logvar_ptr + logvar_row, mask=valid, other=0.0).to(DTYPE)
            if SCALE != PLAIN:
                log_variance, slope = scale_terms(log_variance, numbers, SCALE, CLAMP, FLOOR)
            inverse = exponential(-log_variance)
    if REDUCTION == NONE:
        ll_row = row_offset(place, ll_sample, ll)
    if grad_mean_ptr is not None:
        grad_mean_row = row_offset(place, grad_mean_sample, grad_mean)
    if LOGVAR_GRADIENT == PER_ELEMENT:
        grad_logvar_row = row_offset(place, grad_logvar_sample, grad_logvar)

    total = tl.zeros([ROWS, WIDTH], DTYPE)
    total_to_logvar = tl.zeros([ROWS, WIDTH], DTYPE)
    for i in range(iterations):
        here = tile_at(begin, i, None, count, inner, WIDTH, LANES, LANE_ALIGNED)
        takes_part = counted(mask_ptr, mask, mask_row, here, MASK_ALIGNED, LANES)
        x_tile = load(x_ptr, x, x_row, here, ALIGNED, DTYPE)
        mean_tile = load(mean_ptr, mean, mean_row, here, ALIGNED, DTYPE)
        residual = x_tile - mean_tile
        if ROW_VARIANCE:
            tile_log_variance = log_variance
            tile_inverse = inverse
        else:
            tile_log_variance = load(logvar_ptr, logvar, logvar_row, here, ALIGNED, DTYPE)
            if SCALE != PLAIN:
                tile_log_variance, slope = scale_terms(
                    tile_log_variance, numbers, SCALE, CLAMP, FLOOR
                )
            tile_inverse = exponential(-tile_log_variance)
        scaled = residual * tile_inverse

        if REDUCTION == NONE:
            nats = -0.5 * tl.fma(residual, scaled, tile_log_variance + LOG_2PI)
            nats = kept(nats, takes_part, mask_ptr)
            store(ll_ptr, ll, ll_row, here, nats, ALIGNED)
        elif ll_ptr is not None:
            if mask_ptr is not None:
                nats = tl.fma(residual, scaled, tile_log_variance + LOG_2PI)
                total += tl.where(takes_part, nats, 0.0)
            elif ROW_VARIANCE:
                total = tl.fma(residual, residual, total)
            elif SCALE != PLAIN:
                nats = tl.fma(residual, scaled, tile_log_variance)
                total += tl.where(takes_part, nats, 0.0)
            else:
                total += tl.fma(residual, scaled, tile_log_variance)

        weight = upstream
        if grad_ptr is not None:
            if grad.kind != CONSTANT:
                weight *= load(grad_ptr, grad, grad_row, here, ALIGNED, DTYPE)
        if grad_mean_ptr is not None:
            to_mean = kept(weight * scaled, takes_part, mask_ptr)
            store(grad_mean_ptr, grad_mean, grad_mean_row, here, to_mean, ALIGNED)
        if LOGVAR_GRADIENT != NOT_WANTED:
            to_logvar = (0.5 * weight) * tl.fma(residual, scaled, -1.0)
            if SCALE != PLAIN:
                to_logvar = through(slope, to_logvar)
            if LOGVAR_GRADIENT == PER_ELEMENT:
                to_logvar = kept(to_logvar, takes_part, mask_ptr)
                store(grad_logvar_ptr, grad_logvar, grad_logvar_row, here, to_logvar, ALIGNED)
            else:
                total_to_logvar += tl.where(takes_part, to_logvar, 0.0)

    if REDUCTION == SAMPLE or REDUCTION == TOTAL:
        sums = add_columns(total, ROWS, WIDTH, LANES)
        # Without a mask the constants of all elements come here, once for each that exists; those
        # that do not were loaded as 0 and have added nothing.
        if mask_ptr is not None:
            sums = tl.where(valid, sums, 0.0)
        elif ROW_VARIANCE:
            sums = tl.where(
                valid, tl.fma(sums, inverse, count.to(DTYPE) * (log_variance + LOG_2PI)), 0.0
            )
        else:
            sums = tl.fma(count.to(DTYPE), LOG_2PI, sums)
        sums *= -0.5 * from_bits(ll_scale, DTYPE)
        if REDUCTION == SAMPLE:
            tl.store(ll_ptr + (row * splits + split), sums, mask=valid)
        else:
            tl.store(ll_ptr + program, tl.sum(tl.sum(sums, axis=1), axis=0))
    if LOGVAR_GRADIENT == PER_ROW:
        sums = add_columns(total_to_logvar, ROWS, WIDTH, LANES)
        tl.store(grad_logvar_ptr + (row * splits + split), sums, mask=valid)


@kernel
def likelihood_kernel(
    x_ptr,
    x,
    x_sample: tl.int64,
    mean_ptr,
    mean,
    mean_sample: tl.int64,
    logvar_ptr,
    logvar,
    logvar_sample: tl.int64,
    mask_ptr,
    mask,
    mask_sample: tl.int64,
    grad_ptr,
    grad,
    grad_sample: tl.int64,
    ll_ptr,
    ll,
    ll_sample: tl.int64,
    grad_mean_ptr,
    grad_mean,
    grad_mean_sample: tl.int64,
    grad_logvar_ptr,
    grad_logvar,
    grad_logvar_sample: tl.int64,
    logvar_value: tl.int64,
    floor: tl.int64,
    clamp_min: tl.int64,
    clamp_max: tl.int64,
    ll_scale: tl.int64,
    grad_scale: tl.int64,
    rows: tl.int64,
    batch: tl.int64,
    channels: tl.int64,
    event: tl.int64,
    inner: tl.int32,
    iterations: tl.int32,
    splits: tl.int32,
    REDUCTION: tl.constexpr,
    LOGVAR_GRADIENT: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The log-likelihood, its gradients, or both: per element, or summed per program as in
    `latent_forward_kernel`.
    """
    likelihood_tiles(
        tl.program_id(0).to(tl.int64),
        x_ptr, x, x_sample, mean_ptr, mean, mean_sample, logvar_ptr, logvar, logvar_sample,
        mask_ptr, mask, mask_sample, grad_ptr, grad, grad_sample, ll_ptr, ll, ll_sample,
        grad_mean_ptr, grad_mean, grad_mean_sample,
        grad_logvar_ptr, grad_logvar, grad_logvar_sample,
        logvar_value, floor, clamp_min, clamp_max, ll_scale, grad_scale,
        rows, batch, channels, event, inner, iterations, splits,
        REDUCTION, LOGVAR_GRADIENT, SPLIT_ROWS, SCALE, CLAMP, FLOOR,
        ROWS, WIDTH, LANES, LANE_ALIGNED, ALIGNED, MASK_ALIGNED, DTYPE,
    )  # fmt: skip
