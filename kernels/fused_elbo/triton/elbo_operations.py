"""The raw operation of the evidence lower bound: outputs allocated, arguments laid out, kernels
launched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..parametrization import PLAIN, ScaleParams
from ..schemas import BATCHMEAN, FAKES, NO_CLAMP, NONE, SAMPLE
from .elbo import elbo_finish_kernel, elbo_kernel
from .geometry import ABSENT, arrange, divide, lanes, memory_order
from .launch import (
    add_all,
    bits,
    empty_sum,
    launch,
    operand,
    row_tile,
    scale_arguments,
    triton_dtype,
)
from .likelihood_operations import Likelihood


def elbo_forward(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | None,
    recon_logvar_value: float,
    mean: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    beta_value: float,
    reduction: int,
    want_grads: bool,
    mask: Tensor | None = None,
    scale: int = PLAIN,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = FAKES["elbo_forward"](
        recon_x,
        x,
        recon_logvar,
        recon_logvar_value,
        mean,
        logvar,
        kl,
        beta,
        beta_value,
        reduction,
        want_grads,
    )
    loss, ll_out, kl_out, grad_recon, grad_recon_logvar, grad_mean, grad_logvar = outputs
    rows = ll_out.shape[0]
    if rows == 0:
        grad_recon_logvar.zero_()
        empty_sum(loss, rows, reduction)
        return outputs
    loss_scale = 1.0 / rows if reduction == BATCHMEAN else 1.0
    dtype = triton_dtype(loss.dtype)
    weights = {"beta_ptr": beta, "beta_value": bits(beta_value), "loss_scale": bits(loss_scale)}

    recon = Likelihood(
        x,
        recon_x,
        recon_logvar,
        recon_logvar_value,
        1,
        mask,
        ScaleParams(scale, floor, clamp_min, clamp_max),
        grad_mean=grad_recon if want_grads else None,
        grad_logvar=grad_recon_logvar if want_grads and recon_logvar is not None else None,
    )
    latent = None
    if mean is not None and logvar is not None and mean.numel():
        latent = arrange(
            {
                "mean": mean[None],
                "logvar": logvar[None],
                "grad_mean": grad_mean[None] if want_grads else None,
                "grad_logvar": grad_logvar[None] if want_grads else None,
            },
            frozenset({"grad_mean", "grad_logvar"}),
            lanes(mean.dtype),
            order=memory_order(mean[None]),
        )
    division = divide(0 if latent is None else latent.event, 1)
    recon_programs = recon.programs if recon_x.numel() else 0
    latent_programs = 0 if latent is None else division.programs(rows)
    ll_parts = (
        loss.new_empty(recon.arranged.rows * recon.division.splits)
        if recon_programs
        else loss.new_zeros(rows)
    )
    if latent_programs:
        kl_parts = loss.new_empty(rows * division.splits)
    else:
        kl_parts = loss.new_zeros(rows) if kl is None else kl.contiguous()

    if recon_programs + latent_programs:
        arguments: dict[str, Any] = {}
        names = {
            "x": "x",
            "mean": "recon",
            "logvar": "recon_logvar",
            "mask": "mask",
            "grad_mean": "grad_recon",
            "grad_logvar": "grad_recon_logvar",
        }
        pointers = recon.pointers(None)
        for name, here in names.items():
            arguments.update(operand(here, pointers[name], recon.arranged.layouts[name]))
        for name in ("mean", "logvar", "grad_mean", "grad_logvar"):
            tensor, layout = (
                (None, ABSENT) if latent is None else (latent.tensors[name], latent.layouts[name])
            )
            arguments.update(operand(name, tensor, layout))
        latent_lanes = recon.lanes if mean is None else lanes(mean.dtype)
        launch(
            elbo_kernel,
            recon_programs + latent_programs,
            loss.device,
            **arguments,
            **weights,
            ll_ptr=ll_parts,
            kl_ptr=kl_parts,
            ll_scale=bits(1.0),
            recon_programs=recon_programs,
            recon_logvar_value=bits(recon_logvar_value),
            **scale_arguments(recon.scale),
            recon_grad_scale=bits(-loss_scale),
            **{f"recon_{name}": value for name, value in recon.numbers().items()},
            latent_rows=rows,
            latent_event=0 if latent is None else latent.event,
            latent_inner=1 if latent is None else latent.inner,
            latent_iterations=division.iterations,
            latent_splits=division.splits,
            LOGVAR_GRADIENT=recon.gradient,
            SPLIT_ROWS=recon.arranged.split,
            **{f"RECON_{name}": value for name, value in recon.tile().items()},
            LATENT_ROWS=division.rows,
            LATENT_WIDTH=division.width,
            LATENT_LANES=latent_lanes,
            LATENT_LANE_ALIGNED=latent is not None and latent.event % latent_lanes == 0,
            LATENT_ALIGNED=latent is not None and latent.aligned,
            DTYPE=dtype,
        )
        recon.finish()
        if latent is not None:
            latent.finish()

    ll_count, kl_count = ll_parts.numel() // rows, kl_parts.numel() // rows
    tile_rows, _ = row_tile(max(ll_count, kl_count))
    programs = -(-rows // tile_rows)
    per_row = reduction in (NONE, SAMPLE)
    losses = loss if per_row or programs == 1 else loss.new_empty(programs)
    launch(
        elbo_finish_kernel,
        programs,
        loss.device,
        **weights,
        ll_parts_ptr=ll_parts,
        kl_parts_ptr=kl_parts,
        loss_ptr=losses,
        ll_ptr=ll_out,
        kl_ptr=kl_out,
        rows=rows,
        ll_parts=ll_count,
        kl_parts=kl_count,
        PER_ROW_LOSS=per_row,
        ROWS=tile_rows,
        LL_WIDTH=row_tile(ll_count)[1],
        KL_WIDTH=row_tile(kl_count)[1],
        DTYPE=dtype,
    )
    if losses is not loss:
        add_all(losses, loss)
    return outputs
