"""The commonest calls as C++ functions with C++ autograd nodes (csrc/fastpath), where they can be
had.

An `autograd.Function` written in Python takes longer than the kernels of a small latent. torch's
stable ABI has no autograd nodes, so ``_fastpath`` is compiled against one torch and one Python, and
used with these alone: a wheel that finds others runs `ops` instead, with the same results.

Every function returns None where a call is not for it, and has then done nothing.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _library
from .parametrization import ScaleParams
from .schemas import EXTENSION

__all__ = ["load", "reason"]


def _not_here(*_: object) -> None:
    """Stands for a function of `_fastpath` that is not loaded."""


#: For the checked arguments of an operation: what `ops.latent`, `ops.likelihood` and `ops.elbo` do.
latent: Callable[..., tuple[Tensor, Tensor] | None] = _not_here
likelihood: Callable[..., Tensor | None] = _not_here
elbo: Callable[..., tuple[Tensor, Tensor, Tensor] | None] = _not_here
#: For the arguments of a public function as they come.
reparameterize_kl: Callable[..., tuple[Tensor, Tensor] | None] = _not_here
gaussian_kl: Callable[..., Tensor | None] = _not_here
posterior: Callable[..., tuple[Tensor, Tensor] | None] = _not_here
gaussian_log_likelihood: Callable[..., Tensor | None] = _not_here
elbo_loss: Callable[..., tuple[Tensor, Tensor, Tensor] | None] = _not_here
#: (cpu, cuda): for which devices the public functions' calls run the extension.
serve: Callable[[bool, bool], None] = _not_here

_FUNCTIONS = (
    "latent",
    "likelihood",
    "elbo",
    "reparameterize_kl",
    "gaussian_kl",
    "posterior",
    "gaussian_log_likelihood",
    "elbo_loss",
    "serve",
)


def load() -> None:
    """Puts the functions of `_fastpath` in the place of those here, if it can be used. The
    extension is loaded already."""
    if reason() is None:
        compiled = importlib.import_module("fused_elbo._fastpath")
        globals().update({name: getattr(compiled, name) for name in _FUNCTIONS})


@functools.cache
def reason() -> str | None:
    """Why the fast path is not used, or None if it is."""
    if os.environ.get("FUSED_ELBO_FASTPATH") == "0":
        return "FUSED_ELBO_FASTPATH=0"
    info = _library.build_info()
    if info is None:
        return "the package was not built"
    if info.fastpath is None:
        return info.fastpath_note
    # Another build of the same version may lay out its classes differently.
    found = f"{torch.__version__} {torch.version.git_version}"
    if found != info.fastpath:
        return f"compiled against torch {info.fastpath}, and this is torch {found}"
    try:
        compiled = importlib.import_module("fused_elbo._fastpath")
    except ImportError as error:
        return f"fused_elbo._fastpath does not load into this Python: {error}"
    compiled.set_formulas(_latent_formula, _likelihood_formula, _elbo_formula)
    return None


# What backward runs where a graph of it is wanted: the gradients in differentiable PyTorch.


def _latent_formula(
    inputs: tuple[Any, ...], params: tuple[Any, ...], grad_z: Any, grad_kl: Any
) -> tuple[Any, ...]:
    from .calls import LatentParams, latent_backward_plain
    from .registration import kernels

    return latent_backward_plain(kernels(EXTENSION), LatentParams(*params), inputs, grad_z, grad_kl)


def _likelihood_formula(
    inputs: tuple[Any, ...], params: tuple[Any, ...], grad: Any
) -> tuple[Any, ...]:
    from .calls import LikelihoodParams, likelihood_backward_plain, likelihood_gradients

    x, mean, logvar, mask = inputs
    grads = likelihood_backward_plain(LikelihoodParams(*params), x, mean, logvar, mask, grad)
    return likelihood_gradients(*grads, (True, True, True))


def _elbo_formula(
    inputs: tuple[Any, ...], params: tuple[Any, ...], grad_loss: Any
) -> tuple[Any, ...]:
    from .elbo_call import ELBOInputs, ELBOParams, elbo_backward_plain

    recon_logvar_value, beta_value, reduction, scale = params
    given = ELBOParams(recon_logvar_value, beta_value, reduction, ScaleParams(*scale))
    return elbo_backward_plain(ELBOInputs(*inputs), given, grad_loss)
