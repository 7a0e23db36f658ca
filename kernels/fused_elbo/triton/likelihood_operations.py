"""The raw operations of the likelihood: outputs allocated, arguments laid out, kernels launched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..parametrization import PLAIN, PLAIN_SCALE, ScaleParams
from ..reference import accumulate_dtype
from ..schemas import BATCHMEAN, FAKES, NO_CLAMP, NONE, OFF, SAMPLE, nats_like
from .geometry import NOT_WANTED, PER_ELEMENT, PER_ROW, arrange, divide, lanes, memory_order
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
from .likelihood import likelihood_kernel

_MIN_SHARED_RUN = (
    32  # elements that share a variance, from which on they are worth a row of their own
)


class Likelihood:
    """One likelihood laid out for the kernels: arguments, and what to do once they have run."""

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        logvar_value: float,
        batch_dims: int,
        mask: Tensor | None,
        scale: ScaleParams,
        ll: Tensor | None = None,
        grad: Tensor | None = None,
        grad_mean: Tensor | None = None,
        grad_logvar: Tensor | None = None,
    ) -> None:
        """``ll`` is given where it is wanted per element; all but logvar and its gradient have the
        shape of mean, and with a scale other than plain so has logvar.
        """
        self.device, self.dtype = mean.device, accumulate_dtype(mean.dtype)
        self.squeeze = batch_dims == 1
        self.logvar, self.grad_logvar = logvar, grad_logvar
        self.logvar_value = logvar_value
        self.scale = scale if scale.code != PLAIN else PLAIN_SCALE
        self.lanes = lanes(mean.dtype)
        self.shape = self._lead(mean).shape
        self.order = memory_order(self._lead(mean))
        self.channel_dims, shared = self._channels()
        self.gradient = NOT_WANTED if grad_logvar is None else PER_ROW if shared else PER_ELEMENT
        self.buffer: Tensor | None = (
            None  # a gradient per element, where logvar broadcasts in a way that rows do not have
        )
        target = None
        if grad_logvar is not None and not shared:
            if grad_logvar.shape == mean.shape:
                target = grad_logvar
            else:
                target = self.buffer = torch.empty_like(mean, dtype=self.dtype)

        tensors = {
            "x": x,
            "mean": mean,
            "logvar": None if logvar is None else logvar.expand(mean.shape),
            "mask": mask_bytes(mask),
            "grad": grad,
            "ll": ll,
            "grad_mean": grad_mean,
            "grad_logvar": target,
        }
        self.arranged = arrange(
            {name: None if t is None else self._lead(t) for name, t in tensors.items()},
            frozenset({"ll", "grad_mean", "grad_logvar"}),
            self.lanes,
            channel_dims=self.channel_dims,
            order=self.order,
        )
        self.division = divide(self.arranged.event, 1)
        self.programs = self.division.programs(self.arranged.rows)
        self.parts: Tensor | None = None  # the gradient of logvar, per row and program
        if self.gradient == PER_ROW:
            self.parts = mean.new_empty(self.arranged.rows * self.division.splits, dtype=self.dtype)

    def _lead(self, t: Tensor) -> Tensor:
        return t[None] if self.squeeze else t

    def _channels(self) -> tuple[int, bool]:
        """How many event dimensions number rows, and whether logvar is one value over each row's
        event by its shape.
        """
        if self.logvar is None:
            return 0, False
        event = self.shape[2:]
        given = (1,) * (len(self.shape) - self.logvar.dim()) + tuple(self.logvar.shape)
        shared_dims, shared = 0, 1
        for d in reversed(self.order):
            if given[2 + d] != 1:
                break
            shared_dims += 1
            shared *= event[d]
        if shared_dims == len(event):
            return 0, True
        return (len(event) - shared_dims, True) if shared >= _MIN_SHARED_RUN else (0, False)

    def pointers(self, ll: Tensor | None) -> dict[str, Tensor | None]:
        """Tensors by name; ``ll`` is where the sums per program go, if they are wanted."""
        tensors = dict(self.arranged.tensors)
        if ll is not None:
            tensors["ll"] = ll
        if self.parts is not None:
            tensors["grad_logvar"] = self.parts
        return tensors

    def numbers(self) -> dict[str, Any]:
        arranged, division = self.arranged, self.division
        return {
            "rows": arranged.rows,
            "batch": arranged.batch,
            "channels": arranged.channels,
            "event": arranged.event,
            "inner": arranged.inner,
            "iterations": division.iterations,
            "splits": division.splits,
        }

    def tile(self) -> dict[str, Any]:
        return {
            "ROWS": self.division.rows,
            "WIDTH": self.division.width,
            "LANES": self.lanes,
            "LANE_ALIGNED": self.arranged.event % self.lanes == 0,
            "ALIGNED": self.arranged.aligned,
            "MASK_ALIGNED": self.arranged.mask_aligned,
        }

    def finish(self) -> None:
        """Sums the gradient of logvar over what logvar broadcasts over, and copies back what had to
        be copied.
        """
        self.arranged.finish()
        if self.logvar is None or self.grad_logvar is None:
            return
        if self.parts is not None:
            samples, batch, *event = self.shape
            kept = [event[d] for d in self.order[: self.channel_dims]]
            ones = [1] * (len(event) - self.channel_dims)
            sums = self.parts.view(samples, batch, *kept, *ones, self.division.splits).sum(-1)
            sums = sums.permute(0, 1, *(2 + self.order.index(d) for d in range(len(event))))
            sums = sums[0] if self.squeeze else sums
        elif self.buffer is not None:
            sums = self.buffer
        else:
            return
        self.grad_logvar.copy_(sums.sum_to_size(self.logvar.shape))


def likelihood_forward(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    mask: Tensor | None = None,
    logvar_value: float = 0.0,
    batch_dims: int = 1,
    reduction: int = SAMPLE,
    scale: int = PLAIN,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
) -> Tensor:
    ll = nats_like(mean, batch_dims, reduction)
    rows = math.prod(mean.shape[:batch_dims])
    if mean.numel() == 0:
        return empty_sum(ll, rows, reduction)
    plan = Likelihood(
        x,
        mean,
        logvar,
        logvar_value,
        batch_dims,
        mask,
        ScaleParams(scale, floor, clamp_min, clamp_max),
        ll=ll if reduction == NONE else None,
    )
    sums = Sums(ll, reduction, plan.arranged.rows, plan.division)
    _launch(plan, reduction, sums.parts, ll_scale=1.0 / rows if reduction == BATCHMEAN else 1.0)
    sums.finish()
    plan.finish()
    return ll


def likelihood_backward(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    grad: Tensor,
    want_mean: bool,
    want_logvar: bool,
    mask: Tensor | None = None,
    logvar_value: float = 0.0,
    batch_dims: int = 1,
    reduction: int = SAMPLE,
    scale: int = PLAIN,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = FAKES["likelihood_backward"](
        x, mean, logvar, grad, want_mean, want_logvar
    )
    grad_mean, grad_logvar = grads
    if mean.numel() == 0:
        return grad_mean, grad_logvar.zero_()
    if reduction != NONE:
        grad = grad.reshape(grad.shape + (1,) * (mean.dim() - grad.dim())).expand(mean.shape)
    plan = Likelihood(
        x,
        mean,
        logvar,
        logvar_value,
        batch_dims,
        mask,
        ScaleParams(scale, floor, clamp_min, clamp_max),
        grad=grad,
        grad_mean=grad_mean if want_mean else None,
        grad_logvar=grad_logvar if want_logvar and logvar is not None else None,
    )
    rows = math.prod(mean.shape[:batch_dims])
    _launch(plan, OFF, None, grad_scale=1.0 / rows if reduction == BATCHMEAN else 1.0)
    plan.finish()
    return grad_mean, grad_logvar


def _launch(
    plan: Likelihood,
    reduction: int,
    ll: Tensor | None,
    ll_scale: float = 1.0,
    grad_scale: float = 1.0,
) -> None:
    arguments: dict[str, Any] = {}
    for name, tensor in plan.pointers(ll).items():
        arguments.update(operand(name, tensor, plan.arranged.layouts[name]))
        arguments[f"{name}_sample"] = plan.arranged.sample_strides[name]
    launch(
        likelihood_kernel,
        plan.programs,
        plan.device,
        **arguments,
        **plan.numbers(),
        logvar_value=bits(plan.logvar_value),
        **scale_arguments(plan.scale),
        ll_scale=bits(ll_scale),
        grad_scale=bits(grad_scale),
        REDUCTION=kernel_reduction(reduction),
        LOGVAR_GRADIENT=plan.gradient,
        SPLIT_ROWS=plan.arranged.split,
        **plan.tile(),
        DTYPE=triton_dtype(plan.dtype),
    )
