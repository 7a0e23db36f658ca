"""torch.nn.functional: `gaussian_nll_loss` in one kernel, also under torch.compile.

    from fused_elbo.integrations.torch_functional import gaussian_nll_loss

is the function of that name; `apply` puts it into `torch.nn.functional`, and so into
`torch.nn.GaussianNLLLoss`.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import has_torch_function

from .._checks import FLOATING
from ..functional import gaussian_log_likelihood
from ..parametrization import Parametrization
from ..reference import LOG_2PI
from ._patching import Attribute, Patch, Replacement, expect_parameters

__all__ = ["applied", "apply", "gaussian_nll_loss", "undo"]

_upstream: Any = functional.gaussian_nll_loss


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`: ``1/2 * (log(max(var, eps)) + (input - target)**2 /
    max(var, eps))``.

    Same arguments, values (to rounding), gradients and errors. Like the original it looks at every
    variance for a negative one, which waits for the device; inside torch.compile, where the
    original breaks the graph, that check is an assertion in the graph (RuntimeError).

    Args:
        input, target, var, full, eps, reduction: as in torch. Dtypes that the kernels do not know,
            tensor subclasses and a negative eps are left to the original.

    Returns:
        The dtype of torch's result.

    Raises:
        ValueError: a negative variance, a shape of var that does not fit, an unknown reduction.
    """
    tensors = (input, target, var) if isinstance(var, Tensor) else (input, target)
    if (
        has_torch_function(tensors)
        or not isinstance(var, (float, Tensor))
        or any(t.dtype not in FLOATING for t in tensors)
        or eps < 0
    ):
        return _upstream(input, target, var, full, eps, reduction)  # type: ignore[no-any-return]
    _refuse_negative(var)
    if isinstance(var, Tensor):
        var = _like_input(var, input)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    if isinstance(var, Tensor):
        return _heteroscedastic(input, target, var, full, eps, reduction)
    return _one_variance(input, target, max(var, eps), full, reduction)


def _heteroscedastic(
    input: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: str
) -> Tensor:
    shape = torch.broadcast_shapes(input.shape, target.shape, var.shape)
    elementwise = reduction == "none"
    log_likelihood = gaussian_log_likelihood(
        _batched(target, shape),
        _batched(input, shape),
        var if shape else var.reshape(1),
        param=Parametrization("var", floor=eps),
        reduction="none" if elementwise else "sample",
    )
    loss = -log_likelihood
    if not full:  # per element or sample: where the constant is still small
        loss = loss - 0.5 * LOG_2PI * (1 if elementwise else math.prod(shape[1:]))
    return _reduced(loss, shape, reduction).to(_result_dtype(input, target, var))


def _one_variance(input: Tensor, target: Tensor, var: float, full: bool, reduction: str) -> Tensor:
    shape = torch.broadcast_shapes(input.shape, target.shape)
    elementwise = reduction == "none"
    # With this variance the constants of the density cancel: pi times the squared error is left.
    log_likelihood = gaussian_log_likelihood(
        _batched(target, shape),
        _batched(input, shape),
        -LOG_2PI,
        reduction="none" if elementwise else "sample",
    )
    constant = 0.5 * ((math.log(var) if var > 0 else -math.inf) + (LOG_2PI if full else 0.0))
    count = 1 if elementwise else math.prod(shape[1:])
    scale = -1.0 / (2.0 * math.pi * var) if var > 0 else -math.inf
    loss = log_likelihood * scale + constant * count
    return _reduced(loss, shape, reduction).to(_result_dtype(input, target))


def _refuse_negative(var: Tensor | float) -> None:
    message = "var has negative entry/entries"
    negative = var < 0
    if isinstance(negative, Tensor):
        if torch.compiler.is_compiling():
            torch._assert_async(~torch.any(negative), message)
            return
        negative = bool(torch.any(negative))
    if negative:
        raise ValueError(message)


def _like_input(var: Tensor, input: Tensor) -> Tensor:
    """The variance as it broadcasts: of input's shape, without the last dimension, or 1 in one."""
    if var.shape == input.shape:
        return var
    if var.shape == input.shape[:-1]:
        return var.unsqueeze(-1)
    different = [v for v, i in zip(var.shape, input.shape) if v != i]
    if var.dim() != input.dim() or sum(different) != 1:
        raise ValueError("var is of incorrect size")
    return var


def _batched(t: Tensor, shape: torch.Size) -> Tensor:
    return t.expand(shape) if shape else t.reshape(1)


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    """That of torch's arithmetic, where a 0-dim tensor yields to others (Dynamo cannot ask
    `torch.result_type`)."""
    deciding = [t for t in tensors if t.dim()] or tensors
    return functools.reduce(torch.promote_types, [t.dtype for t in deciding])


def _reduced(loss: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    if reduction == "none":
        return loss.reshape(shape)
    total = loss.sum()
    return total if reduction == "sum" else total / math.prod(shape)


def apply() -> None:
    """Put the function into `torch.nn.functional`, for the whole process, until `undo`.

    Raises:
        RuntimeError: torch's own takes other parameters.
    """
    _patch.apply(None)


def undo() -> None:
    """Put torch's own function back."""
    _patch.undo()


def applied() -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads."""
    return _patch.applied(None)


def _replacements() -> list[Replacement]:
    name = "gaussian_nll_loss"
    parameters = ("input", "target", "var", "full", "eps", "reduction")
    expect_parameters("torch_functional", functional, name, *parameters)
    return [Replacement(Attribute(functional, name), gaussian_nll_loss)]


_patch: Patch[None] = Patch(_replacements, None)
