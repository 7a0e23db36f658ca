"""The raw operations: what every backend implements, and what their outputs look like before
anything runs.

A raw operation is not differentiable; `ops` adds autograd. Conventions that all of them share:

- ``reduction``: -1 not wanted, 0 none, 1 sample, 2 sum, 3 batchmean. An output that is not wanted
  has shape ``[0]``.
- Everything in nats, and the gradient flowing into it, is float32 (float64 for float64 inputs).
- ``seed`` is a 0-dim int64 tensor on the device of the inputs; without it ``seed_value`` is the
  seed.
- ``chunk_dim >= 0``: ``mean`` holds mean and logvar, chunked along that dimension; so does
  ``grad_mean``.
- ``scale``, ``floor``, ``clamp_min``, ``clamp_max``: a `parametrization.ScaleParams`.
  ``clamp_min <= -1e300`` and ``clamp_max >= 1e300``, infinities among them, stand for no clamp. A
  likelihood's scale is not 0 only where logvar has the shape of mean.
- ``mask``: bool, of the shape of mean (expanded where it was broadcast); False gives z = 0, no nats
  and no gradient, whatever the element holds.
- Defaults are those of the commonest call: each argument costs 0.15 us on its way to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import accumulate_dtype

#: The namespace of the extension's operations, for CPU and CUDA tensors.
EXTENSION = "fused_elbo"
OFF, NONE, SAMPLE, SUM, BATCHMEAN = -1, 0, 1, 2, 3
NO_CLAMP = 1e300  # schemas have no literal for infinity
REDUCTIONS = {"none": NONE, "sample": SAMPLE, "sum": SUM, "batchmean": BATCHMEAN}

_SCALE = "int scale=0, float floor=0.0, float clamp_min=-1e300, float clamp_max=1e300"
_LATENT_PARAMS = (
    "Tensor? mask=None, SymInt seed_value=0, int stream=0, SymInt row_offset=0, "
    f"SymInt num_samples=0, int chunk_dim=-1, {_SCALE}"
)
_LIKELIHOOD_PARAMS = (
    "Tensor? mask=None, float logvar_value=0.0, int batch_dims=1, int reduction=1, " + _SCALE
)
_LATENT_INPUTS = "Tensor mean, Tensor? logvar, Tensor? prior_mean, Tensor? prior_logvar"

#: name -> signature, the same in every namespace that holds kernels. csrc/torch_ops.cpp repeats
#: them.
SCHEMAS = {
    "latent_forward": (
        f"({_LATENT_INPUTS}, Tensor? seed, {_LATENT_PARAMS}, bool want_z=True, int reduction=1) "
        "-> (Tensor z, Tensor kl)"
    ),
    "latent_backward": (
        f"({_LATENT_INPUTS}, Tensor? grad_z, Tensor? grad_kl, Tensor? seed, {_LATENT_PARAMS}, "
        "int reduction=1, bool want_prior=False) -> (Tensor grad_mean, Tensor grad_logvar, "
        "Tensor grad_prior_mean, Tensor grad_prior_logvar)"
    ),
    "likelihood_forward": (
        f"(Tensor x, Tensor mean, Tensor? logvar, {_LIKELIHOOD_PARAMS}) -> Tensor"
    ),
    "likelihood_backward": (
        "(Tensor x, Tensor mean, Tensor? logvar, Tensor grad, bool want_mean, bool want_logvar, "
        f"{_LIKELIHOOD_PARAMS}) -> (Tensor grad_mean, Tensor grad_logvar)"
    ),
    "elbo_forward": (
        "(Tensor recon_x, Tensor x, Tensor? recon_logvar, float recon_logvar_value, Tensor? mean, "
        "Tensor? logvar, Tensor? kl, Tensor? beta, float beta_value, int reduction, "
        f"bool want_grads, Tensor? mask=None, {_SCALE}) -> (Tensor loss, Tensor log_likelihood, "
        "Tensor kl_out, Tensor grad_recon, Tensor grad_recon_logvar, Tensor grad_mean, "
        "Tensor grad_logvar)"
    ),
    "fold_seed": "(Tensor seed, SymInt data) -> Tensor",
    "noise_words": "(Tensor seed, int stream, int sample, int first, int count) -> Tensor",
}


def halves(mean: Tensor, logvar: Tensor | None, chunk_dim: int) -> tuple[Tensor, Tensor]:
    """mean and logvar as views, whether given as two tensors or as one tensor of moments."""
    if logvar is not None:
        return mean, logvar
    size = mean.shape[chunk_dim] // 2
    return mean.narrow(chunk_dim, 0, size), mean.narrow(chunk_dim, size, size)


def nats_like(reference: Tensor, batch_dims: int, reduction: int) -> Tensor:
    """An uninitialised output in nats for a tensor ``[*batch, *event]``."""
    shapes = {OFF: (0,), NONE: reference.shape, SAMPLE: reference.shape[:batch_dims]}
    return reference.new_empty(shapes.get(reduction, ()), dtype=accumulate_dtype(reference.dtype))


def _latent_forward(
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
    scale: int = 0,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
    want_z: bool = True,
    reduction: int = SAMPLE,
) -> tuple[Tensor, Tensor]:
    mean, _ = halves(mean, logvar, chunk_dim)
    if not want_z:
        z = mean.new_empty(0)
    elif num_samples:
        z = mean.new_empty((num_samples, *mean.shape))
    else:
        z = torch.empty_like(mean)
    return z, nats_like(mean, 1, reduction)


def _latent_backward(
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
    scale: int = 0,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
    reduction: int = SAMPLE,
    want_prior: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_logvar = mean.new_empty(0) if logvar is None else torch.empty_like(logvar)
    if not want_prior or prior_mean is None or prior_logvar is None:
        return torch.empty_like(mean), grad_logvar, mean.new_empty(0), mean.new_empty(0)
    part, _ = halves(mean, logvar, chunk_dim)
    return (
        torch.empty_like(mean),
        grad_logvar,
        part.new_empty(part.shape),
        part.new_empty(part.shape),
    )


def _likelihood_forward(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | None,
    mask: Tensor | None = None,
    logvar_value: float = 0.0,
    batch_dims: int = 1,
    reduction: int = SAMPLE,
    scale: int = 0,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
) -> Tensor:
    return nats_like(mean, batch_dims, reduction)


def _likelihood_backward(
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
    scale: int = 0,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
) -> tuple[Tensor, Tensor]:
    grad_mean = torch.empty_like(mean) if want_mean else mean.new_empty(0)
    grad_logvar = (
        logvar.new_empty(logvar.shape) if want_logvar and logvar is not None else mean.new_empty(0)
    )
    return grad_mean, grad_logvar


def _elbo_forward(
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
    scale: int = 0,
    floor: float = 0.0,
    clamp_min: float = -NO_CLAMP,
    clamp_max: float = NO_CLAMP,
) -> tuple[Tensor, ...]:
    def grad(t: Tensor | None) -> Tensor:
        return torch.empty_like(t) if want_grads and t is not None else recon_x.new_empty(0)

    per_sample = nats_like(recon_x, 1, SAMPLE)
    loss = nats_like(per_sample, 1, reduction)
    grad_recon_logvar = (
        recon_logvar.new_empty(recon_logvar.shape)
        if want_grads and recon_logvar is not None
        else recon_x.new_empty(0)
    )
    return (
        loss,
        per_sample,
        torch.empty_like(per_sample),
        grad(recon_x),
        grad_recon_logvar,
        grad(mean),
        grad(logvar),
    )


def _fold_seed(seed: Tensor, data: int) -> Tensor:
    return torch.empty_like(seed)


def _noise_words(seed: Tensor, stream: int, sample: int, first: int, count: int) -> Tensor:
    return seed.new_empty((count, 4))


#: name -> shape, dtype and layout of the outputs.
FAKES: dict[str, Callable[..., Any]] = {
    "latent_forward": _latent_forward,
    "latent_backward": _latent_backward,
    "likelihood_forward": _likelihood_forward,
    "likelihood_backward": _likelihood_backward,
    "elbo_forward": _elbo_forward,
    "fold_seed": _fold_seed,
    "noise_words": _noise_words,
}
