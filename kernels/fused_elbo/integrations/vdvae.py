"""VDVAE: its two functions of log-standard-deviations, without a pass to convert them.

    from fused_elbo.integrations.vdvae import draw_gaussian_diag_samples, gaussian_analytical_kl

in the place of the import from ``vae_helpers``; or, with the code left as it is,

    from fused_elbo.integrations import vdvae

    vdvae.apply(vae_helpers, vae)  # every module that holds the names

(Child, "Very Deep VAEs", arXiv 2011.10650.) NVAE (arXiv 2007.03898) adds a floor and a soft clamp:
``Parametrization("logstd", floor=0.01, clamp=(-5, 5), soft_clamp=True)`` as ``param=`` of
`fused_elbo.reparameterize_kl`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from torch import Tensor

from ..functional import gaussian_kl, reparameterize
from ._patching import Patch, PatchByOwner, Replacement, checked_modules, function_replacements

__all__ = ["applied", "apply", "draw_gaussian_diag_samples", "gaussian_analytical_kl", "undo"]


def gaussian_analytical_kl(
    mu1: Tensor, mu2: Tensor, logsigma1: Tensor, logsigma2: Tensor
) -> Tensor:
    """KL(N(mu1, exp(logsigma1)**2) || N(mu2, exp(logsigma2)**2)) for every element, in nats.

    Args:
        mu1, logsigma1: the posterior, ``[B, *event]``, same shape.
        mu2, logsigma2: the prior; anything that broadcasts to the shape of mu1.

    Returns:
        ``[B, *event]``, float32 (float64 for float64); gradients flow to all four.

    Raises:
        TypeError, ValueError: as `fused_elbo.gaussian_kl`.

    Equivalent to::

        ratio = (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / logsigma2.exp() ** 2
        kl = -0.5 + logsigma2 - logsigma1 + 0.5 * ratio
    """
    return gaussian_kl(mu1, logsigma1, mu2, logsigma2, param="logstd", reduction="none")


def draw_gaussian_diag_samples(mu: Tensor, logsigma: Tensor) -> Tensor:
    """A reparameterized sample of N(mu, exp(logsigma)**2), seeded from torch's generator.

    Args:
        mu, logsigma: ``[B, *event]``, same shape.

    Raises:
        TypeError, ValueError: as `fused_elbo.reparameterize`.

    Equivalent to::

        mu + torch.exp(logsigma) * torch.randn_like(mu)
    """
    return reparameterize(mu, logsigma, param="logstd")


def apply(*modules: ModuleType) -> None:
    """Replace both functions in modules that define or import them, until `undo`.

    Raises:
        RuntimeError: a module has neither, or with other parameters; none has been replaced then.
        TypeError: no module, or something else.
    """
    _patches.apply(checked_modules("vdvae.apply", modules), None)


def undo(*modules: ModuleType) -> None:
    """Put the functions of these modules back; without arguments, of all."""
    _patches.undo(modules)


def applied(*modules: ModuleType) -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads; arguments as there."""
    return _patches.applied(checked_modules("vdvae.applied", modules), None)


_FUNCTIONS = {
    "gaussian_analytical_kl": (gaussian_analytical_kl, ("mu1", "mu2", "logsigma1", "logsigma2")),
    "draw_gaussian_diag_samples": (draw_gaussian_diag_samples, ("mu", "logsigma")),
}


def _replacements(module: Any, patch: Patch[None]) -> list[Replacement]:
    return function_replacements("vdvae", module, _FUNCTIONS)


_patches: PatchByOwner[None] = PatchByOwner(_replacements, None)
