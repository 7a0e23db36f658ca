"""The negative evidence lower bound in one reading of every tensor: both parts, and every gradient
where wanted.

    loss = sum_b beta KL_b - log p(x_b | z_b)

The first programs of the grid work on the reconstruction, the others on the latent; a second, tiny
kernel adds up what they found. Kingma and Welling, arXiv:1312.6114; beta as in Higgins et al.,
"beta-VAE", ICLR 2017.
"""

# Triton's dialect: no types, and `if` on constants decides what is compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl

from .formulas import expm1_of_double, exponentials, from_bits
from .likelihood import likelihood_tiles
from .reduction import add_up
from .tiles import SAMPLE, add_columns, first_row, kernel, load, row_start, store, tile_at


@triton.jit
def standard_normal_tiles(
    program,
    mean_ptr,
    mean,
    logvar_ptr,
    logvar,
    kl_ptr,
    grad_mean_ptr,
    grad_mean,
    grad_logvar_ptr,
    grad_logvar,
    weight,
    rows,
    event,
    inner,
    iterations,
    splits,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    LANE_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """KL to N(0, I), summed per row and program, and `weight` times its gradients."""
    row = first_row(program, splits, ROWS)
    valid = row < rows
    split = program % splits
    begin = tl.zeros_like(row) + split * iterations * WIDTH
    length = (iterations * WIDTH).to(tl.int64)
    count = tl.where(valid, tl.minimum(event - begin, length), 0).to(tl.int32)
    total = tl.zeros([ROWS, WIDTH], DTYPE)
    for i in range(iterations):
        here = tile_at(begin, i, None, count, inner, WIDTH, LANES, LANE_ALIGNED)
        mean_tile = load(mean_ptr, mean, row_start(row, mean), here, ALIGNED, DTYPE)
        logvar_tile = load(logvar_ptr, logvar, row_start(row, logvar), here, ALIGNED, DTYPE)
        _, less_one, phi = exponentials(0.5 * logvar_tile, False)
        total += tl.fma(mean_tile, mean_tile, phi)
        if grad_mean_ptr is not None:
            to_logvar = (0.5 * weight) * expm1_of_double(less_one)
            store(
                grad_mean_ptr,
                grad_mean,
                row_start(row, grad_mean),
                here,
                weight * mean_tile,
                ALIGNED,
            )
            store(
                grad_logvar_ptr, grad_logvar, row_start(row, grad_logvar), here, to_logvar, ALIGNED
            )
    tl.store(
        kl_ptr + (row * splits + split), 0.5 * add_columns(total, ROWS, WIDTH, LANES), mask=valid
    )


@kernel
def elbo_kernel(
    x_ptr,
    x,
    recon_ptr,
    recon,
    recon_logvar_ptr,
    recon_logvar,
    mask_ptr,
    mask,
    ll_ptr,
    grad_recon_ptr,
    grad_recon,
    grad_recon_logvar_ptr,
    grad_recon_logvar,
    mean_ptr,
    mean,
    logvar_ptr,
    logvar,
    kl_ptr,
    grad_mean_ptr,
    grad_mean,
    grad_logvar_ptr,
    grad_logvar,
    beta_ptr,
    beta_value: tl.int64,
    loss_scale: tl.int64,
    ll_scale: tl.int64,
    recon_programs: tl.int64,
    recon_logvar_value: tl.int64,
    floor: tl.int64,
    clamp_min: tl.int64,
    clamp_max: tl.int64,
    recon_grad_scale: tl.int64,
    recon_rows: tl.int64,
    recon_batch: tl.int64,
    recon_channels: tl.int64,
    recon_event: tl.int64,
    recon_inner: tl.int32,
    recon_iterations: tl.int32,
    recon_splits: tl.int32,
    latent_rows: tl.int64,
    latent_event: tl.int64,
    latent_inner: tl.int32,
    latent_iterations: tl.int32,
    latent_splits: tl.int32,
    LOGVAR_GRADIENT: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    CLAMP: tl.constexpr,
    FLOOR: tl.constexpr,
    RECON_ROWS: tl.constexpr,
    RECON_WIDTH: tl.constexpr,
    RECON_LANE_ALIGNED: tl.constexpr,
    LATENT_ROWS: tl.constexpr,
    LATENT_WIDTH: tl.constexpr,
    LATENT_LANE_ALIGNED: tl.constexpr,
    RECON_LANES: tl.constexpr,
    LATENT_LANES: tl.constexpr,
    RECON_ALIGNED: tl.constexpr,
    RECON_MASK_ALIGNED: tl.constexpr,
    LATENT_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums per row and program to ll and kl, and the gradients for an upstream gradient of 1. Mask
    and scale parametrization are the reconstruction's.
    """
    program = tl.program_id(0).to(tl.int64)
    if program < recon_programs:
        likelihood_tiles(
            program,
            x_ptr, x, 0, recon_ptr, recon, 0, recon_logvar_ptr, recon_logvar, 0,
            mask_ptr, mask, 0, None, recon, 0, ll_ptr, recon, 0,
            grad_recon_ptr, grad_recon, 0, grad_recon_logvar_ptr, grad_recon_logvar, 0,
            recon_logvar_value, floor, clamp_min, clamp_max, ll_scale, recon_grad_scale,
            recon_rows, recon_batch, recon_channels, recon_event, recon_inner,
            recon_iterations, recon_splits,
            SAMPLE, LOGVAR_GRADIENT, SPLIT_ROWS, SCALE, CLAMP, FLOOR,
            RECON_ROWS, RECON_WIDTH, RECON_LANES, RECON_LANE_ALIGNED, RECON_ALIGNED,
            RECON_MASK_ALIGNED, DTYPE,
        )  # fmt: skip
    else:
        if mean_ptr is not None:
            weight = from_bits(loss_scale, DTYPE) * beta_of(beta_ptr, beta_value, DTYPE)
            standard_normal_tiles(
                program - recon_programs,
                mean_ptr, mean, logvar_ptr, logvar, kl_ptr,
                grad_mean_ptr, grad_mean, grad_logvar_ptr, grad_logvar, weight,
                latent_rows, latent_event, latent_inner, latent_iterations, latent_splits,
                LATENT_ROWS, LATENT_WIDTH, LATENT_LANES, LATENT_LANE_ALIGNED, LATENT_ALIGNED, DTYPE,
            )  # fmt: skip


@triton.jit
def beta_of(beta_ptr, beta_value, DTYPE: tl.constexpr):
    if beta_ptr is not None:
        return tl.load(beta_ptr).to(DTYPE)
    else:
        return from_bits(beta_value, DTYPE)


@kernel
def elbo_finish_kernel(
    ll_parts_ptr,
    kl_parts_ptr,
    beta_ptr,
    loss_ptr,
    ll_ptr,
    kl_ptr,
    beta_value: tl.int64,
    loss_scale: tl.int64,
    rows: tl.int64,
    ll_parts: tl.int32,
    kl_parts: tl.int32,
    PER_ROW_LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    LL_WIDTH: tl.constexpr,
    KL_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """ll and kl per row from their parts, and the loss per row, or its sum over the rows of each
    program.
    """
    program = tl.program_id(0).to(tl.int64)
    row = first_row(program, 1, ROWS)
    valid = row < rows
    ll = add_up(ll_parts_ptr, row, rows, ll_parts, ROWS, LL_WIDTH, DTYPE)
    kl = add_up(kl_parts_ptr, row, rows, kl_parts, ROWS, KL_WIDTH, DTYPE)
    loss = tl.fma(beta_of(beta_ptr, beta_value, DTYPE), kl, -ll) * from_bits(loss_scale, DTYPE)
    tl.store(ll_ptr + row, ll, mask=valid)
    tl.store(kl_ptr + row, kl, mask=valid)
    if PER_ROW_LOSS:
        tl.store(loss_ptr + row, loss, mask=valid)
    else:
        loss = tl.where(valid, loss, 0.0)
        tl.store(loss_ptr + program, tl.sum(tl.sum(loss, axis=1), axis=0))
