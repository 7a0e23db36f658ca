"""From one call to one kernel: autograd, torch.compile and torch.func around the raw operations.

Three tiers, because each costs what the next one up would have to add to it:

- while torch.compile traces, a registered operation with an autograd formula (an opaque node in the
  graph);
- under torch.func transforms, a `setup_context` Function with `vmap` and `jvp` (and inside a plain
  dual level of forward-mode AD, the formulas of `reference` on the kernels' noise);
- otherwise a plain Function where gradients are wanted, and the raw operation where they are not;
  both in C++ (`fastpath`) for the extension's kernels, where that could be built.

Nothing but inputs and the seed is saved for backward; `elbo` alone saves its gradients, which the
same pass has computed. With ``create_graph=True`` backward runs the formulas of `reference`, which
autograd can differentiate again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import fastpath, reference
from .calls import (
    COMMON_PARAMS,
    REDUCTION_NAMES,
    Kernels,
    LatentParams,
    LikelihoodParams,
    TracedKernels,
    latent_backward_plain,
    latent_backward_raw,
    latent_forward_raw,
    latent_plain,
    likelihood_backward_plain,
    likelihood_backward_raw,
    likelihood_gradients,
    likelihood_plain,
    present,
)
from .elbo_call import (
    ELBOInputs,
    ELBOParams,
    elbo_arguments,
    elbo_backward_plain,
    elbo_backward_scaled,
)
from .registration import kernels
from .schemas import BATCHMEAN, EXTENSION, SAMPLE, SCHEMAS, SUM
from .transforms import Call, LatentTransform, LikelihoodTransform

__all__ = [
    "COMMON_PARAMS",
    "SCHEMAS",
    "ELBOInputs",
    "ELBOParams",
    "Kernels",
    "LatentParams",
    "LikelihoodParams",
    "TracedKernels",
    "draw_seed",
    "elbo",
    "elbo_backward_scaled",
    "fold_seed",
    "kernels",
    "latent",
    "likelihood",
]

_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def latent(
    kernels: Kernels | None,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    params: LatentParams,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z and KL; ``kernels=None`` runs the reference."""
    if kernels is None:
        return latent_plain(None, params, mean, logvar, prior_mean, prior_logvar, seed, mask)
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops, kernels.namespace).latent.default
        return traced(mean, logvar, prior_mean, prior_logvar, seed, mask, *params)  # type: ignore[no-any-return]
    if kernels.namespace == EXTENSION:
        done = fastpath.latent(mean, logvar, prior_mean, prior_logvar, seed, mask, params)
        if done is not None:
            return done
    if _functorch_active():
        call = Call(kernels, params)
        return LatentTransform.apply(call, mean, logvar, prior_mean, prior_logvar, seed, mask)  # type: ignore[no-any-return]
    if forward_ad._current_level >= 0:
        return latent_plain(kernels, params, mean, logvar, prior_mean, prior_logvar, seed, mask)
    if torch.is_grad_enabled() and (
        mean.requires_grad
        or (logvar is not None and logvar.requires_grad)
        or (
            prior_mean is not None
            and prior_logvar is not None
            and (prior_mean.requires_grad or prior_logvar.requires_grad)
        )
    ):
        return _Latent.apply(kernels, params, mean, logvar, prior_mean, prior_logvar, seed, mask)  # type: ignore[no-any-return, no-untyped-call]
    return latent_forward_raw(kernels, params, mean, logvar, prior_mean, prior_logvar, seed, mask)


class _Latent(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        params: LatentParams,
        mean: Tensor,
        logvar: Tensor | None,
        prior_mean: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        inputs = (mean, logvar, prior_mean, prior_logvar, seed, mask)
        ctx.save_for_backward(*inputs)
        ctx.kernels, ctx.params = kernels, params
        return latent_forward_raw(kernels, params, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            grads = latent_backward_plain(ctx.kernels, ctx.params, inputs, grad_z, grad_kl)
        else:
            want_prior = needed[4] or needed[5]
            grads = latent_backward_raw(
                ctx.kernels, ctx.params, inputs, grad_z, grad_kl, want_prior
            )
            if needed[2] and needed[3] and not want_prior:
                return None, None, grads[0], grads[1], None, None, None, None
        return None, None, *(present(grads, needed[2:6])), None, None


def likelihood(
    kernels: Kernels | None,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    params: LikelihoodParams,
    mask: Tensor | None = None,
) -> Tensor:
    """log N(x; mean, exp(logvar)); ``kernels=None`` runs the reference."""
    if kernels is None:
        return likelihood_plain(params, x, mean, logvar, mask)
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops, kernels.namespace).likelihood.default
        return traced(x, mean, logvar, mask, *params)  # type: ignore[no-any-return]
    if kernels.namespace == EXTENSION:
        done = fastpath.likelihood(x, mean, logvar, mask, params)
        if done is not None:
            return done
    if _functorch_active():
        return LikelihoodTransform.apply(Call(kernels, params), x, mean, logvar, mask)  # type: ignore[no-any-return]
    if forward_ad._current_level >= 0:
        return likelihood_plain(params, x, mean, logvar, mask)
    if torch.is_grad_enabled() and (
        mean.requires_grad or x.requires_grad or (logvar is not None and logvar.requires_grad)
    ):
        return _Likelihood.apply(kernels, params, x, mean, logvar, mask)  # type: ignore[no-any-return, no-untyped-call]
    return kernels.likelihood_forward(x, mean, logvar, mask, *params.raw())


class _Likelihood(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        params: LikelihoodParams,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, logvar, mask)
        ctx.kernels, ctx.params = kernels, params
        return kernels.likelihood_forward(x, mean, logvar, mask, *params.raw())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:5]
        if torch.is_grad_enabled():  # create_graph=True
            x, mean, logvar, mask = inputs
            plain = likelihood_backward_plain(ctx.params, x, mean, logvar, mask, grad)
            grads = likelihood_gradients(*plain, wanted)
        else:
            grads = likelihood_backward_raw(ctx.kernels, ctx.params, inputs, grad, wanted)
        return None, None, *grads, None


def elbo(
    kernels: Kernels | None, inputs: ELBOInputs, params: ELBOParams
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, and its parts per sample without gradient; ``kernels=None`` runs the reference."""
    if kernels is not None and not torch.compiler.is_compiling() and kernels.namespace == EXTENSION:
        done = fastpath.elbo(*inputs, params)
        if done is not None:
            return done
    if kernels is None or _functorch_active() or forward_ad._current_level >= 0:
        # The parts compose: under torch.func each is its own transformable kernel.
        loss, ll, kl = _elbo_from_parts(kernels, inputs, params)
        return loss, ll.detach(), kl.detach()
    want_grads = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in inputs[:6]
    )
    half = inputs.recon_x.dtype == torch.float16 or (
        inputs.mean is not None and inputs.mean.dtype == torch.float16
    )
    if want_grads and params.reduction == BATCHMEAN and half:
        # Divided by the batch size before a loss scale multiplies them, the gradients of the
        # forward pass would fall below the smallest float16.
        loss, ll, kl = elbo(kernels, inputs, params._replace(reduction=SUM))
        return loss / inputs.recon_x.shape[0], ll, kl
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops, kernels.namespace).elbo.default
        loss, ll, kl, *_ = traced(*elbo_arguments(inputs, params, want_grads))
        return loss, ll.detach(), kl.detach()
    if want_grads:
        return _ELBO.apply(kernels, params, *inputs)  # type: ignore[no-any-return, no-untyped-call]
    loss, ll, kl, *_ = kernels.elbo_forward(*elbo_arguments(inputs, params, False))
    return loss, ll, kl


def _elbo_from_parts(
    kernels: Kernels | None, inputs: ELBOInputs, params: ELBOParams
) -> tuple[Tensor, Tensor, Tensor]:
    recon_x, x, recon_logvar, mean, logvar, kl, beta, mask = inputs
    likelihood_params = LikelihoodParams(params.recon_logvar_value, 1, SAMPLE, *params.scale)
    ll = likelihood(kernels, x, recon_x, recon_logvar, likelihood_params, mask)
    if kl is None:
        assert mean is not None
        no_noise = LatentParams(want_z=False)
        _, kl = latent(kernels, mean, logvar, None, None, None, no_noise)
    weighted = (params.beta_value if beta is None else beta) * kl - ll
    return reference.reduce(weighted, REDUCTION_NAMES[params.reduction]), ll, kl


class _ELBO(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, params: ELBOParams, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = ELBOInputs(*inputs)  # type: ignore[arg-type]
        loss, ll, kl, *grads = kernels.elbo_forward(*elbo_arguments(tensors, params, True))
        ctx.save_for_backward(*inputs, *grads)
        ctx.kernels, ctx.params = kernels, params
        ctx.mark_non_differentiable(ll, kl)
        return loss, ll, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # unpacked once: activation checkpointing refuses a second time
        inputs = ELBOInputs(*saved[:8])
        if torch.is_grad_enabled():  # create_graph=True
            grads = elbo_backward_plain(inputs, ctx.params, grad_loss)
        else:
            grads = ctx.kernels.elbo_backward(
                inputs, ctx.params, saved[8:], grad_loss, ctx.needs_input_grad[2:8]
            )
        return (
            None,
            None,
            *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[2:8])),
            None,
            None,
        )


# seeds


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
    """One seed from a generator (default: torch's), as a 0-dim int64 tensor on the device."""
    if torch.compiler.is_compiling() and generator is None:
        return _draw_seed_op()(device)  # type: ignore[no-any-return]
    if _functorch_active():  # an in-place draw has no vmap rule; this one honors vmap's randomness=
        return torch.randint(
            -(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device, generator=generator
        )
    like = _seed_like.get(device)
    if like is None or _dispatch_modes() > 0:  # a mode's tensors are of its own kind
        seed = torch.empty((), dtype=torch.int64, device=device)
        if type(seed) is Tensor:
            _seed_like[device] = seed
    else:
        seed = torch.empty_like(like)  # half the time of torch.empty
    return seed.random_() if generator is None else seed.random_(generator=generator)


_seed_like: dict[torch.device, Tensor] = {}
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# Dynamo refuses Tensor.random_ inside a full graph, so the draw sits inside an operation.
_seed_library = torch.library.Library("fused_elbo", "FRAGMENT")
_seed_library.define(
    "draw_seed(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
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
