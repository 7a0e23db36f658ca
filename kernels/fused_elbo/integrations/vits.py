"""VITS: its masked KL term.

    from fused_elbo.integrations.vits import kl_loss

in the place of the import from ``losses``; or, with the code left as it is,

    from fused_elbo.integrations import vits

    vits.apply(losses)  # every module that holds the name

(Kim, Kong and Son, arXiv 2106.06103, section 2.1.3.)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..functional import gaussian_log_likelihood
from ..reference import LOG_2PI
from ._patching import Patch, PatchByOwner, Replacement, checked_modules, function_replacements

__all__ = ["applied", "apply", "kl_loss", "undo"]


def kl_loss(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, z_mask: Tensor) -> Tensor:
    """The KL of posterior from prior in nats per unmasked frame, z_p being a sample after the flow.

    The posterior's entropy is exact and the prior's density is that of the sample:
    ``sum(logs_p - logs_q - 1/2 + (z_p - m_p)**2 * exp(-2 logs_p) / 2) / number of frames``.

    Args:
        z_p, logs_q, m_p, logs_p: ``[B, H, T]``, same shape; log-standard-deviations.
        z_mask: ``[B, 1, T]``, 0 (padding) or 1. Padding adds nothing and gets no gradient, even if
            it holds NaN.

    Returns:
        0-dim, float32 (float64 for float64); gradients flow to the first four.

    Raises:
        TypeError, ValueError: as `fused_elbo.gaussian_log_likelihood`.

    Equivalent to::

        kl = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p) ** 2 * torch.exp(-2.0 * logs_p)
        loss = torch.sum(kl * z_mask) / torch.sum(z_mask)
    """
    counts = z_mask != 0
    log_likelihood = gaussian_log_likelihood(z_p, m_p, logs_p, param="logstd", mask=counts)
    nats = log_likelihood.dtype
    scale = torch.where(counts, logs_q, 0.0).flatten(1).sum(1, dtype=nats)
    frames = counts.sum(dim=tuple(range(1, counts.dim())), dtype=nats)
    elements = frames * (z_p[0].numel() // max(counts[0].numel(), 1))
    # Per sample: the constants cancel where they are still small.
    kl = -log_likelihood - scale - (0.5 + 0.5 * LOG_2PI) * elements
    return kl.sum() / z_mask.sum(dtype=nats)


def apply(*modules: ModuleType) -> None:
    """Replace ``kl_loss`` in modules that define or import it, until `undo`.

    Raises:
        RuntimeError: a module has none, or with other parameters; none has been replaced then.
        TypeError: no module, or something else.
    """
    _patches.apply(checked_modules("vits.apply", modules), None)


def undo(*modules: ModuleType) -> None:
    """Put the function of these modules back; without arguments, of all."""
    _patches.undo(modules)


def applied(*modules: ModuleType) -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads; arguments as there."""
    return _patches.applied(checked_modules("vits.applied", modules), None)


_FUNCTIONS = {"kl_loss": (kl_loss, ("z_p", "logs_q", "m_p", "logs_p", "z_mask"))}


def _replacements(module: Any, patch: Patch[None]) -> list[Replacement]:
    return function_replacements("vits", module, _FUNCTIONS)


_patches: PatchByOwner[None] = PatchByOwner(_replacements, None)
