"""Kernels under torch.func: Functions with `setup_context`, `vmap` and `jvp`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .calls import (
    Kernels,
    latent_backward_plain,
    latent_backward_raw,
    latent_plain,
    likelihood_backward_plain,
    likelihood_gradients,
    likelihood_plain,
    present,
)


def _vmap_by_row(
    function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Any, Any]:
    """Runs a Function per entry of the mapped dimension: each has the noise of an unmapped call."""
    per_entry = [
        function.apply(
            *(a.select(dim, i) if dim is not None else a for a, dim in zip(args, in_dims))
        )
        for i in range(info.batch_size)
    ]
    if isinstance(per_entry[0], Tensor):
        return torch.stack(per_entry), 0
    outputs = tuple(torch.stack(entries) for entries in zip(*per_entry))
    return outputs, (0,) * len(outputs)


class Call:
    """What of a call is no tensor. Opaque: torch.func would take tuples apart."""

    __slots__ = ("kernels", "params")

    def __init__(self, kernels: Kernels, params: Any) -> None:
        self.kernels, self.params = kernels, params


class _Transform(Function):
    """A kernel under torch.func: forward is one raw operation, derivatives are those of its plain
    formula.

    Arguments are a `Call` and then tensors or None. Subclasses say what to run (`_raw`), the
    formula (`_plain`), and may give the gradient a kernel of its own by overriding `backward`.
    """

    _raw: Callable[..., Any]
    _plain: Callable[..., Any]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @classmethod
    def _derive(cls, ctx: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...], list[int]]:
        """The plain formula of the floating-point arguments, those arguments, and their places."""
        saved = ctx.saved_tensors
        places = [i for i, t in enumerate(saved) if t is not None and t.is_floating_point()]

        def formula(*tensors: Tensor) -> Any:
            arguments = list(saved)
            for place, tensor in zip(places, tensors):
                arguments[place] = tensor
            return cls._plain(ctx.call.kernels, ctx.call.params, *arguments)

        return formula, tuple(saved[i] for i in places), places

    @classmethod
    def _pull_back(cls, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        formula, tensors, places = cls._derive(ctx)
        output, pull = torch.func.vjp(formula, *tensors)  # type: ignore[misc]
        gradients = dict(zip(places, pull(grads[0] if isinstance(output, Tensor) else grads)))
        return None, *(gradients.get(i) for i in range(len(ctx.saved_tensors)))

    @classmethod
    def _push_forward(cls, ctx: Any, *tangents: Any) -> Any:
        formula, tensors, places = cls._derive(ctx)
        tensors = tuple(t.contiguous() for t in tensors)  # an expanded one cannot take a tangent
        given = tangents[1:]
        moved = tuple(
            torch.zeros_like(t) if given[i] is None else given[i] for i, t in zip(places, tensors)
        )
        return torch.func.jvp(formula, tensors, moved)[1]


def _transform(
    name: str, raw: Callable[..., Any], plain: Callable[..., Any], backward: Any = None
) -> Any:
    """Assembles the static methods that torch.func looks for."""

    def forward(call: Call, *tensors: Tensor | None) -> Any:
        return raw(call.kernels, call.params, *tensors)

    cls = type(
        name, (_Transform,), {"forward": staticmethod(forward), "_plain": staticmethod(plain)}
    )
    transform: Any = cls
    transform.backward = staticmethod(backward or transform._pull_back)
    transform.jvp = staticmethod(transform._push_forward)
    transform.vmap = staticmethod(functools.partial(_vmap_by_row, transform))
    return transform


def _latent_transform_backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Any, ...]:
    grads = _LatentBackwardTransform.apply(ctx.call, *ctx.saved_tensors, grad_z, grad_kl)
    return None, *present(grads, tuple(g.numel() > 0 or g.shape != (0,) for g in grads)), None, None


def _likelihood_transform_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    logvar = ctx.saved_tensors[2]
    grad_mean, grad_logvar = _LikelihoodBackwardTransform.apply(ctx.call, *ctx.saved_tensors, grad)
    return (
        None,
        *likelihood_gradients(grad_mean, grad_logvar, (True, True, logvar is not None)),
        None,
    )


LatentTransform = _transform(
    "LatentTransform",
    lambda kernels, params, *tensors: kernels.latent_forward(*tensors, *params),
    latent_plain,
    _latent_transform_backward,
)
_LatentBackwardTransform = _transform(
    "_LatentBackwardTransform",
    lambda kernels, params, *tensors: latent_backward_raw(
        kernels, params, tensors[:6], tensors[6], tensors[7], tensors[2] is not None
    ),
    lambda kernels, params, *tensors: latent_backward_plain(
        kernels, params, tensors[:6], tensors[6], tensors[7]
    ),
)
LikelihoodTransform = _transform(
    "LikelihoodTransform",
    lambda kernels, params, *tensors: kernels.likelihood_forward(*tensors, *params),
    lambda kernels, params, *tensors: likelihood_plain(params, *tensors),
    _likelihood_transform_backward,
)
_LikelihoodBackwardTransform = _transform(
    "_LikelihoodBackwardTransform",
    lambda kernels, params, x, mean, logvar, mask, grad: kernels.likelihood_backward(
        x, mean, logvar, grad, True, logvar is not None, mask, *params
    ),
    lambda kernels, params, *tensors: likelihood_backward_plain(params, *tensors),
)
