"""From one call to one kernel: autograd, torch.compile and torch.func around the raw operations.

Three tiers, because each costs what the next one up would have to add to it:

- while torch.compile traces, a registered operation with an autograd formula (an opaque node in the graph);
- under torch.func transforms, a `setup_context` Function with `vmap` and `jvp` (and inside a plain dual level of forward-mode
  AD, the formulas of `reference` on the kernels' noise);
- otherwise a plain Function where gradients are wanted, and the raw operation where they are not.

Nothing but inputs and the seed is saved for backward; `elbo` alone saves its gradients, which the same pass has computed.
With ``create_graph=True`` backward runs the formulas of `reference`, which autograd can differentiate again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import reference
from .noise import NoiseKey
from .schemas import FAKES, NONE, OFF, REDUCTIONS, SAMPLE, SCHEMAS, halves

_REDUCTION_NAMES = {code: name for name, code in REDUCTIONS.items()}
_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


class Kernels(NamedTuple):
    """The raw operations of one namespace, and how `elbo` turns its saved gradients into those of a backward pass."""

    namespace: str
    latent_forward: Callable[..., tuple[Tensor, Tensor]]
    latent_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    likelihood_forward: Callable[..., Tensor]
    likelihood_backward: Callable[..., tuple[Tensor, Tensor]]
    elbo_forward: Callable[..., tuple[Tensor, ...]]
    fold_seed: Callable[..., Tensor]
    noise_words: Callable[..., Tensor]
    elbo_backward: Callable[..., tuple[Tensor | None, ...]]


class TracedKernels(NamedTuple):
    """What stands for `Kernels` while torch.compile traces: operations are looked up by name, which leaves no guards."""

    namespace: str


# ------------------------------------------------------------------------------------------------ sampling and KL


class LatentParams(NamedTuple):
    """The arguments of `latent_forward` that are not tensors, in its order."""

    seed_value: int
    stream: int
    row_offset: int
    num_samples: int
    chunk_dim: int
    clamp_min: float
    clamp_max: float
    want_z: bool
    reduction: int


def latent(
    kernels: Kernels | None,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    params: LatentParams,
) -> tuple[Tensor, Tensor]:
    """z and KL; ``kernels=None`` runs the reference."""
    if kernels is None:
        return _latent_plain(None, params, mean, logvar, prior_mean, prior_logvar, seed)
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops, kernels.namespace).latent.default
        return traced(mean, logvar, prior_mean, prior_logvar, seed, *params)  # type: ignore[no-any-return]
    if _functorch_active():
        return _LatentTransform.apply(_Call(kernels, params), mean, logvar, prior_mean, prior_logvar, seed)  # type: ignore[no-any-return]
    if forward_ad._current_level >= 0:
        return _latent_plain(kernels, params, mean, logvar, prior_mean, prior_logvar, seed)
    if torch.is_grad_enabled() and (
        mean.requires_grad
        or (logvar is not None and logvar.requires_grad)
        or (prior_mean is not None and prior_logvar is not None and (prior_mean.requires_grad or prior_logvar.requires_grad))
    ):
        return _Latent.apply(kernels, params, mean, logvar, prior_mean, prior_logvar, seed)  # type: ignore[no-any-return]
    return kernels.latent_forward(mean, logvar, prior_mean, prior_logvar, seed, *params)


class _Latent(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        kernels: Kernels,
        params: LatentParams,
        mean: Tensor,
        logvar: Tensor | None,
        prior_mean: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, logvar, prior_mean, prior_logvar, seed)
        ctx.kernels, ctx.params = kernels, params
        return kernels.latent_forward(mean, logvar, prior_mean, prior_logvar, seed, *params)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grads = _latent_backward_plain(ctx.kernels, ctx.params, *inputs, grad_z, grad_kl)
        else:
            grads = _latent_backward_raw(ctx.kernels, ctx.params, *inputs, grad_z, grad_kl, any(ctx.needs_input_grad[4:6]))
        return None, None, *(_present(grads, ctx.needs_input_grad[2:6])), None


def _latent_backward_raw(
    kernels: Kernels,
    params: LatentParams,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    want_prior: bool,
) -> tuple[Tensor, ...]:
    *noise_and_clamp, want_z, reduction = params
    return kernels.latent_backward(
        mean,
        logvar,
        prior_mean,
        prior_logvar,
        grad_z if want_z else None,
        grad_kl if reduction != OFF else None,
        seed,
        *noise_and_clamp,
        reduction,
        want_prior,
    )


def _latent_plain(
    kernels: Kernels | None,
    params: LatentParams,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the kernels compute, in differentiable PyTorch."""
    mean, log_variance = halves(mean, logvar, params.chunk_dim)
    eps = _noise(kernels, params, mean, seed) if params.want_z else None
    z, kl = reference.sample_and_kl(
        mean,
        log_variance,
        prior_mean,
        prior_logvar,
        eps,
        (params.clamp_min, params.clamp_max),
        _REDUCTION_NAMES.get(params.reduction),
    )
    return mean.new_empty(0) if z is None else z, mean.new_empty(0) if kl is None else kl


def _latent_backward_plain(
    kernels: Kernels | None,
    params: LatentParams,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
) -> tuple[Tensor, ...]:
    """What `latent_backward` computes, in differentiable PyTorch."""
    half, log_variance = halves(mean, logvar, params.chunk_dim)
    grad_mean, grad_logvar, *grad_priors = reference.sample_and_kl_backward(
        half,
        log_variance,
        prior_mean,
        prior_logvar,
        _noise(kernels, params, half, seed) if params.want_z and grad_z is not None else None,
        (params.clamp_min, params.clamp_max),
        _REDUCTION_NAMES.get(params.reduction),
        grad_z if params.want_z else None,
        grad_kl,
    )
    empty = mean.new_empty(0)
    priors = tuple(empty if g is None else g for g in grad_priors)
    if logvar is None:
        return torch.cat((grad_mean, grad_logvar), params.chunk_dim), empty, *priors
    return grad_mean, grad_logvar, *priors


def _noise(kernels: Kernels | None, params: LatentParams, mean: Tensor, seed: Tensor | None) -> Tensor:
    """The normals of a call: with mean 0 and logvar 0, z is the noise itself."""
    if kernels is None:
        key = NoiseKey(params.seed_value if seed is None else seed, params.stream, params.row_offset)
        return reference.normals(key, mean.shape, mean.dtype, params.num_samples, mean.device)
    zeros = torch.zeros((), dtype=reference.accumulate_dtype(mean.dtype), device=mean.device).expand(mean.shape)
    only_z = params._replace(chunk_dim=-1, clamp_min=-math.inf, clamp_max=math.inf, want_z=True, reduction=OFF)
    return kernels.latent_forward(zeros, zeros, None, None, seed, *only_z)[0]


# ---------------------------------------------------------------------------------------------------- likelihood


class LikelihoodParams(NamedTuple):
    """The arguments of `likelihood_forward` that are not tensors, in its order."""

    logvar_value: float
    batch_dims: int
    reduction: int


def likelihood(
    kernels: Kernels | None, x: Tensor, mean: Tensor, logvar: Tensor | None, params: LikelihoodParams
) -> Tensor:
    """log N(x; mean, exp(logvar)); ``kernels=None`` runs the reference."""
    if kernels is None:
        return _likelihood_plain(params, x, mean, logvar)
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops, kernels.namespace).likelihood.default
        return traced(x, mean, logvar, *params)  # type: ignore[no-any-return]
    if _functorch_active():
        return _LikelihoodTransform.apply(_Call(kernels, params), x, mean, logvar)  # type: ignore[no-any-return]
    if forward_ad._current_level >= 0:
        return _likelihood_plain(params, x, mean, logvar)
    if torch.is_grad_enabled() and (
        mean.requires_grad or x.requires_grad or (logvar is not None and logvar.requires_grad)
    ):
        return _Likelihood.apply(kernels, params, x, mean, logvar)  # type: ignore[no-any-return]
    return kernels.likelihood_forward(x, mean, logvar, *params)


class _Likelihood(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kernels: Kernels, params: LikelihoodParams, x: Tensor, mean: Tensor, logvar: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, mean, logvar)
        ctx.kernels, ctx.params = kernels, params
        return kernels.likelihood_forward(x, mean, logvar, *params)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, mean, logvar = ctx.saved_tensors
        need_x, need_mean, need_logvar = ctx.needs_input_grad[2:5]
        if torch.is_grad_enabled():  # create_graph=True
            grad_mean, grad_logvar = _likelihood_backward_plain(ctx.params, x, mean, logvar, grad)
        else:
            grad_mean, grad_logvar = ctx.kernels.likelihood_backward(
                x, mean, logvar, *ctx.params, grad, need_x or need_mean, need_logvar
            )
        grads = (-grad_mean if need_x else None, grad_mean if need_mean else None, grad_logvar if need_logvar else None)
        return None, None, *grads


def _likelihood_plain(params: LikelihoodParams, x: Tensor, mean: Tensor, logvar: Tensor | None) -> Tensor:
    return reference.log_likelihood(
        x,
        mean,
        params.logvar_value if logvar is None else logvar,
        params.batch_dims,
        _REDUCTION_NAMES[params.reduction],
    )


def _likelihood_backward_plain(
    params: LikelihoodParams, x: Tensor, mean: Tensor, logvar: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    grad_mean, grad_logvar = reference.log_likelihood_backward(
        x,
        mean,
        params.logvar_value if logvar is None else logvar,
        params.batch_dims,
        _REDUCTION_NAMES[params.reduction],
        grad,
    )
    return grad_mean, mean.new_empty(0) if logvar is None else grad_logvar


# ---------------------------------------------------------------------------------------------------------- ELBO


class ELBOInputs(NamedTuple):
    """The tensors of `elbo_forward` in its order, the number after ``recon_logvar`` and ``beta`` left out."""

    recon_x: Tensor
    x: Tensor
    recon_logvar: Tensor | None
    mean: Tensor | None
    logvar: Tensor | None
    kl: Tensor | None
    beta: Tensor | None


class ELBOParams(NamedTuple):
    recon_logvar_value: float
    beta_value: float
    reduction: int


def elbo(kernels: Kernels | None, inputs: ELBOInputs, params: ELBOParams) -> tuple[Tensor, Tensor, Tensor]:
    """loss, and the two parts per sample, which carry no gradient; ``kernels=None`` runs the reference."""
    if kernels is None or _functorch_active() or forward_ad._current_level >= 0:
        # The parts compose: under torch.func each is its own transformable kernel.
        loss, ll, kl = _elbo_from_parts(kernels, inputs, params)
        return loss, ll.detach(), kl.detach()
    want_grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:6])
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops, kernels.namespace).elbo.default
        loss, ll, kl, *_ = traced(*_elbo_arguments(inputs, params), want_grads)
        return loss, ll.detach(), kl.detach()
    if want_grads:
        return _ELBO.apply(kernels, params, *inputs)  # type: ignore[no-any-return]
    loss, ll, kl, *_ = kernels.elbo_forward(*_elbo_arguments(inputs, params), False)
    return loss, ll, kl


def _elbo_arguments(inputs: ELBOInputs, params: ELBOParams) -> tuple[Any, ...]:
    recon_x, x, recon_logvar, mean, logvar, kl, beta = inputs
    return (
        recon_x,
        x,
        recon_logvar,
        params.recon_logvar_value,
        mean,
        logvar,
        kl,
        beta,
        params.beta_value,
        params.reduction,
    )


class _ELBO(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kernels: Kernels, params: ELBOParams, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = ELBOInputs(*inputs)  # type: ignore[arg-type]
        loss, ll, kl, *grads = kernels.elbo_forward(*_elbo_arguments(tensors, params), True)
        ctx.save_for_backward(*inputs, *grads)
        ctx.kernels, ctx.params = kernels, params
        ctx.mark_non_differentiable(ll, kl)
        return loss, ll, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        inputs = ELBOInputs(*ctx.saved_tensors[:7])
        if torch.is_grad_enabled():  # create_graph=True
            grads = _elbo_backward_plain(inputs, ctx.params, grad_loss)
        else:
            grads = ctx.kernels.elbo_backward(
                inputs, ctx.params, ctx.saved_tensors[7:], grad_loss, ctx.needs_input_grad[2:8]
            )
        return None, None, *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[2:8])), None


def _elbo_backward_scaled(
    inputs: ELBOInputs, params: ELBOParams, saved: tuple[Tensor, ...], grad_loss: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the forward pass, times the upstream gradient."""

    def scale(grad: Tensor, want: bool) -> Tensor | None:
        if not want:
            return None
        if grad_loss.dim() == 0:
            return grad * grad_loss
        if grad.dim() == 0 or grad.shape[0] != grad_loss.shape[0]:
            raise AssertionError("a gradient summed over the batch has no per-sample upstream gradient")
        return grad * grad_loss.view(-1, *(1,) * (grad.dim() - 1)).to(grad.dtype)

    recon_logvar_summed = inputs.recon_logvar is not None and needed[2] and grad_loss.dim() == 1
    if recon_logvar_summed:
        # Summing over the batch came before scaling: redo this one gradient with the upstream gradient known.
        _, _, recon_logvar, *_ = _elbo_backward_plain(inputs, params, grad_loss)
    elif _is_one(grad_loss):
        scale = lambda grad, want: grad if want else None  # noqa: E731
    grad_recon = scale(saved[0], needed[0] or needed[1])
    return (
        grad_recon if needed[0] else None,
        -grad_recon if needed[1] and grad_recon is not None else None,
        recon_logvar if recon_logvar_summed else scale(saved[1], needed[2]),
        scale(saved[2], needed[3]),
        scale(saved[3], needed[4]),
        _elbo_kl_gradient(inputs, params, grad_loss) if needed[5] else None,
    )


def _is_one(grad_loss: Tensor) -> bool:
    """Whether scaling can be left out: only where reading the number costs nothing and nobody keeps the graph."""
    return (
        type(grad_loss) is Tensor
        and grad_loss.dim() == 0
        and grad_loss.device.type == "cpu"
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and grad_loss.item() == 1.0
    )


def _elbo_kl_gradient(inputs: ELBOInputs, params: ELBOParams, grad_loss: Tensor) -> Tensor:
    batch = inputs.recon_x.shape[:1]
    beta = params.beta_value if inputs.beta is None else inputs.beta
    return beta * reference.spread(grad_loss, batch, _REDUCTION_NAMES[params.reduction])


def _elbo_backward_plain(inputs: ELBOInputs, params: ELBOParams, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the loss in differentiable PyTorch."""
    recon_x, x, recon_logvar, mean, logvar, kl, _ = inputs
    batch = recon_x.shape[:1]
    grad_ll = -reference.spread(grad_loss, batch, _REDUCTION_NAMES[params.reduction])
    grad_recon, grad_recon_logvar = reference.log_likelihood_backward(
        x, recon_x, params.recon_logvar_value if recon_logvar is None else recon_logvar, 1, "sample", grad_ll
    )
    grad_kl = _elbo_kl_gradient(inputs, params, grad_loss)
    grad_mean = grad_logvar = None
    if mean is not None and logvar is not None:
        grad_mean, grad_logvar, _, _ = reference.sample_and_kl_backward(
            mean, logvar, None, None, None, (-math.inf, math.inf), "sample", None, grad_kl
        )
    return grad_recon, -grad_recon, grad_recon_logvar, grad_mean, grad_logvar, grad_kl if kl is not None else None


def _elbo_from_parts(
    kernels: Kernels | None, inputs: ELBOInputs, params: ELBOParams
) -> tuple[Tensor, Tensor, Tensor]:
    recon_x, x, recon_logvar, mean, logvar, kl, beta = inputs
    ll = likelihood(kernels, x, recon_x, recon_logvar, LikelihoodParams(params.recon_logvar_value, 1, SAMPLE))
    if kl is None:
        assert mean is not None
        no_noise = LatentParams(0, 0, 0, 0, -1, -math.inf, math.inf, False, SAMPLE)
        _, kl = latent(kernels, mean, logvar, None, None, None, no_noise)
    weighted = (params.beta_value if beta is None else beta) * kl - ll
    return reference.reduce(weighted, _REDUCTION_NAMES[params.reduction]), ll, kl


# -------------------------------------------------------------------------------------- torch.func and forward mode


def _vmap_by_row(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Runs a Function once per entry of the mapped dimension: each entry has the noise of an unmapped call."""
    per_entry = [
        function.apply(*(a.select(dim, i) if dim is not None else a for a, dim in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    if isinstance(per_entry[0], Tensor):
        return torch.stack(per_entry), 0
    outputs = tuple(torch.stack(entries) for entries in zip(*per_entry))
    return outputs, (0,) * len(outputs)


class _Call:
    """What of a call is no tensor. Opaque: torch.func would take tuples apart."""

    __slots__ = ("kernels", "params")

    def __init__(self, kernels: Kernels, params: Any) -> None:
        self.kernels, self.params = kernels, params


class _Transform(Function):
    """A kernel under torch.func: forward is one raw operation, derivatives are those of its plain formula.

    Arguments are a `_Call` and then tensors or None. Subclasses say what to run (`_raw`), the formula
    (`_plain`), and may give the gradient a kernel of its own by overriding `backward`.
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
        """The plain formula as a function of the floating-point tensors among the arguments, and those tensors."""
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
        output, pull = torch.func.vjp(formula, *tensors)
        gradients = dict(zip(places, pull(grads[0] if isinstance(output, Tensor) else grads)))
        return None, *(gradients.get(i) for i in range(len(ctx.saved_tensors)))

    @classmethod
    def _push_forward(cls, ctx: Any, *tangents: Any) -> Any:
        formula, tensors, places = cls._derive(ctx)
        given = tangents[1:]
        moved = tuple(
            torch.zeros_like(t) if given[i] is None else given[i] for i, t in zip(places, tensors)
        )
        return torch.func.jvp(formula, tensors, moved)[1]


def _transform(name: str, raw: Callable[..., Any], plain: Callable[..., Any], backward: Any = None) -> Any:
    """Assembles the static methods that torch.func looks for."""

    def forward(call: _Call, *tensors: Tensor | None) -> Any:
        return raw(call.kernels, call.params, *tensors)

    cls = type(name, (_Transform,), {"forward": staticmethod(forward), "_plain": staticmethod(plain)})
    transform: Any = cls
    transform.backward = staticmethod(backward or transform._pull_back)
    transform.jvp = staticmethod(transform._push_forward)
    transform.vmap = staticmethod(functools.partial(_vmap_by_row, transform))
    return transform


def _latent_transform_backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Any, ...]:
    grads = _LatentBackwardTransform.apply(ctx.call, *ctx.saved_tensors, grad_z, grad_kl)
    return None, *_present(grads, tuple(g.numel() > 0 or g.shape != (0,) for g in grads)), None


def _likelihood_transform_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mean, logvar = ctx.saved_tensors
    grad_mean, grad_logvar = _LikelihoodBackwardTransform.apply(ctx.call, x, mean, logvar, grad)
    return None, -grad_mean, grad_mean, None if logvar is None else grad_logvar


_LatentTransform = _transform(
    "_LatentTransform",
    lambda kernels, params, *tensors: kernels.latent_forward(*tensors, *params),
    _latent_plain,
    _latent_transform_backward,
)
_LatentBackwardTransform = _transform(
    "_LatentBackwardTransform",
    lambda kernels, params, *tensors: _latent_backward_raw(kernels, params, *tensors, tensors[2] is not None),
    _latent_backward_plain,
)
_LikelihoodTransform = _transform(
    "_LikelihoodTransform",
    lambda kernels, params, *tensors: kernels.likelihood_forward(*tensors, *params),
    lambda kernels, params, *tensors: _likelihood_plain(params, *tensors),
    _likelihood_transform_backward,
)
_LikelihoodBackwardTransform = _transform(
    "_LikelihoodBackwardTransform",
    lambda kernels, params, x, mean, logvar, grad: kernels.likelihood_backward(
        x, mean, logvar, *params, grad, True, logvar is not None
    ),
    lambda kernels, params, *tensors: _likelihood_backward_plain(params, *tensors),
)


def _present(grads: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if want else None for g, want in zip(grads, wanted))


# ---------------------------------------------------------------------------------------- registration with torch


@functools.cache
def kernels(namespace: str) -> Kernels:
    """The operations of a namespace whose raw operations are defined, with shapes and autograd registered."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    raw = {name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS}
    for name in ("latent", "likelihood", "elbo"):
        forward = raw[f"{name}_forward"]
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        library.define(name + SCHEMAS[f"{name}_forward"])
        library.impl(name, forward, "CompositeExplicitAutograd")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, FAKES[f"{name}_forward"], lib=library)
        setup, backward = _COMPILED_AUTOGRAD[name]
        torch.library.register_autograd(
            qualified, functools.partial(backward, namespace), setup_context=setup, lib=library
        )
    return Kernels(namespace, **raw, elbo_backward=_elbo_backward_scaled)


_libraries: list[torch.library.Library] = []  # a library undefines its operations when it is collected


def _setup_latent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.params = LatentParams(*inputs[5:])


def _compiled_latent_backward(namespace: str, ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    grads = _latent_backward_raw(
        kernels(namespace), ctx.params, *ctx.saved_tensors, grad_z, grad_kl, needed[2] or needed[3]
    )
    return *_present(grads, needed[:4]), *(None,) * (1 + len(ctx.params))


def _setup_likelihood(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.params = LikelihoodParams(*inputs[3:])


def _compiled_likelihood_backward(namespace: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_x, need_mean, need_logvar = ctx.needs_input_grad[:3]
    grad_mean, grad_logvar = kernels(namespace).likelihood_backward(
        *ctx.saved_tensors, *ctx.params, grad, need_x or need_mean, need_logvar
    )
    grads = (-grad_mean if need_x else None, grad_mean if need_mean else None, grad_logvar if need_logvar else None)
    return *grads, *(None,) * len(ctx.params)


def _setup_elbo(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    recon_x, x, recon_logvar, recon_logvar_value, mean, logvar, kl, beta, beta_value, reduction, _ = inputs
    ctx.save_for_backward(recon_x, x, recon_logvar, mean, logvar, kl, beta, *output[3:])
    ctx.params = ELBOParams(recon_logvar_value, beta_value, reduction)


def _compiled_elbo_backward(namespace: str, ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    recon, x, recon_logvar, mean, logvar, kl = _elbo_backward_scaled(
        ELBOInputs(*ctx.saved_tensors[:7]),
        ctx.params,
        ctx.saved_tensors[7:],
        grad_loss,
        (*needed[:3], *needed[4:7]),
    )
    return recon, x, recon_logvar, None, mean, logvar, kl, None, None, None, None


_COMPILED_AUTOGRAD: dict[str, tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]] = {
    "latent": (_setup_latent, _compiled_latent_backward),
    "likelihood": (_setup_likelihood, _compiled_likelihood_backward),
    "elbo": (_setup_elbo, _compiled_elbo_backward),
}


# --------------------------------------------------------------------------------------------------------- seeds


def fold_seed(seed: Tensor, data: int) -> Tensor:
    """`NoiseKey.fold_in` for a seed that lives on a device."""
    from .backends import select

    here = select(seed.device.type, None)
    if here is None:
        return reference.fold_seed(seed, data)
    if torch.compiler.is_compiling():
        return getattr(torch.ops, here.namespace).fold_seed.default(seed, data)  # type: ignore[no-any-return]
    return here.fold_seed(seed, data)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """One seed from a generator (default: torch's for the device), as a 0-dim int64 tensor on the device."""
    if torch.compiler.is_compiling() and generator is None:
        return _draw_seed_op()(device)  # type: ignore[no-any-return]
    if _functorch_active():  # an in-place draw has no vmap rule; this one honors vmap's randomness=
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device, generator=generator)
    return torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)


# Dynamo refuses Tensor.random_ inside a full graph, so the draw sits inside an operation.
_seed_library = torch.library.Library("fused_elbo", "FRAGMENT")
_seed_library.define("draw_seed(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_seed_library.impl(
    "draw_seed",
    lambda device: torch.empty((), dtype=torch.int64, device=device).random_(),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "fused_elbo::draw_seed",
    lambda device: torch.empty((), dtype=torch.int64, device=device),
    lib=_seed_library,
)


def _draw_seed_op() -> Any:
    return torch.ops.fused_elbo.draw_seed.default
