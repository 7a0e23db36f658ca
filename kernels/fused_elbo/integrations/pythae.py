"""pythae: sampling and losses of the VAE family on the kernels.

    from fused_elbo.integrations import pythae

    pythae.apply()

replaces ``_sample_gauss`` of every model that has one, and ``loss_function`` of VAE, BetaVAE and
DisentangledBetaVAE, whose KL and (for ``reconstruction_loss="mse"``) reconstruction term then take
one kernel each. Subclasses that override them keep their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..functional import gaussian_kl, gaussian_log_likelihood, reparameterize
from ..reference import LOG_2PI
from ._patching import Attribute, Patch, Replacement, expect_parameters, peer

__all__ = ["applied", "apply", "undo"]

Terms = tuple[Tensor, Tensor, Tensor]


def apply(noise: str = "fused") -> None:
    """Replace the methods, for the whole process, until `undo`.

    Args:
        noise: ``"fused"``: samples draw the kernels' noise, from a seed drawn from torch's
            generator; ``"upstream"``: sampling is left to the library.

    Raises:
        ImportError: pythae is not installed. RuntimeError: a version whose methods take other
            arguments. ValueError: an option that does not exist.
    """
    _patch.apply(_checked("pythae.apply", noise))


def undo() -> None:
    """Put the library's own methods back."""
    _patch.undo()


def applied(noise: str = "fused") -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads; arguments as there."""
    return _patch.applied(_checked("pythae.applied", noise))


def _checked(function: str, noise: str) -> str:
    if noise not in ("fused", "upstream"):
        raise ValueError(f'{function}: noise must be "fused" or "upstream", got {noise!r}')
    return noise


def _replacements() -> list[Replacement]:
    models = peer("pythae", "pythae", "pythae.models")
    replacements = []
    for cls in {c for c in vars(models).values() if isinstance(c, type)}:
        if "_sample_gauss" in vars(cls):
            own = expect_parameters("pythae", cls, "_sample_gauss", "self", "mu", "std")
            replacements.append(Replacement(Attribute(cls, "_sample_gauss"), _sampler(own)))
    arguments = ("self", "recon_x", "x", "mu", "log_var", "z")
    for cls, loss, more in (
        (models.VAE, _vae_loss, ()),
        (models.BetaVAE, _beta_vae_loss, ()),
        (models.DisentangledBetaVAE, _disentangled_beta_vae_loss, ("epoch",)),
    ):
        own = expect_parameters("pythae", cls, "loss_function", *arguments, *more)
        replacements.append(Replacement(Attribute(cls, "loss_function"), _loss_function(own, loss)))
    return replacements


def _sampler(upstream: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    def _sample_gauss(self: Any, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        if _patch.options == "upstream":
            return upstream(self, mu, std)
        # The noise is a result too, so it is drawn alone: it is the sample of N(0, I).
        zeros = std.new_zeros(()).expand(std.shape)
        eps = reparameterize(zeros, zeros)
        return mu + eps * std, eps

    return _sample_gauss


def _loss_function(upstream: Callable[..., Terms], fused: Callable[..., Terms]) -> Any:
    def loss_function(
        self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, *rest: Any, **named: Any
    ) -> Terms:
        if mu.dim() != 2:  # summed over the last dimension alone
            return upstream(self, recon_x, x, mu, log_var, *rest, **named)
        return fused(
            self, _reconstruction(self, recon_x, x), gaussian_kl(mu, log_var), *rest, **named
        )

    return functools.wraps(upstream, assigned=("__doc__", "__name__", "__qualname__"))(
        loss_function
    )


def _reconstruction(self: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    """The reconstruction loss per sample: half the squared error, or the cross-entropy."""
    recon_x, x = recon_x.reshape(x.shape[0], -1), x.reshape(x.shape[0], -1)
    if self.model_config.reconstruction_loss == "bce":
        return functional.binary_cross_entropy(recon_x, x, reduction="none").sum(dim=-1)
    # With this variance the constants of the density cancel: pi times the squared error is left.
    return gaussian_log_likelihood(x, recon_x, -LOG_2PI) * (-0.5 / math.pi)


def _vae_loss(self: Any, reconstruction: Tensor, kl: Tensor, z: Tensor) -> Terms:
    return (reconstruction + kl).mean(0), reconstruction.mean(0), kl.mean(0)


def _beta_vae_loss(self: Any, reconstruction: Tensor, kl: Tensor, z: Tensor) -> Terms:
    return (reconstruction + self.beta * kl).mean(0), reconstruction.mean(0), kl.mean(0)


def _disentangled_beta_vae_loss(
    self: Any, reconstruction: Tensor, kl: Tensor, z: Tensor, epoch: int
) -> Terms:
    """The KL is drawn to a capacity that grows with the epochs (arXiv 1804.03599)."""
    capacity = self.C * min(epoch / (self.warmup_epoch + 1), 1)
    loss = (reconstruction + self.beta * (kl - capacity).abs()).mean(0)
    return loss, reconstruction.mean(0), kl.mean(0)


_patch: Patch[str] = Patch(_replacements, "fused")
