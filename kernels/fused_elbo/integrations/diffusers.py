"""diffusers: the posterior of AutoencoderKL on the kernels.

    from fused_elbo.integrations import diffusers

    diffusers.apply()

replaces the methods of `DiagonalGaussianDistribution` in place, and so reaches every autoencoder
that has its posterior from there (AutoencoderKL, AsymmetricAutoencoderKL, Wan, LTX, CogVideoX):
``sample``, ``kl``, ``nll`` and ``mode`` read the encoder's moments where they lie, and ``mean``,
``logvar``, ``std`` and ``var`` are computed when they are asked for.

What differs from the library, unless ``compat=True``: ``kl()`` and ``nll()`` sum over the whole
event also of video and audio latents (the library sums over dimensions 1 to 3), are float32 for
half-precision latents (its own overflow float16), and are zeros ``[B]`` on the right device for a
deterministic posterior (its own: one 0 on the CPU).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ._patching import Patch, Replacement, peer
from ._posterior import DEFAULT, Options, checked_options, posterior_replacements

__all__ = ["applied", "apply", "undo"]


def apply(noise: str = "fused", compat: bool = False) -> None:
    """Replace the methods of `DiagonalGaussianDistribution`, for the whole process, until `undo`.

    Calling it again changes the options.

    Args:
        noise: ``"fused"``: samples draw their noise in the kernel, from a seed drawn from the
            generator that ``sample`` is given (one on the CPU serves every device; in a list each
            seeds one row). ``"upstream"``: samples are those of the library, bit for bit, for the
            same generator; nats are fused.
        compat: ``kl`` and ``nll`` give the library's number also where it sums over three
            dimensions of more, in half precision, and for deterministic posteriors.

    Raises:
        ImportError: diffusers is not installed. RuntimeError: a version whose methods take other
            arguments. TypeError, ValueError: an option that does not exist.
    """
    _patch.apply(checked_options("diffusers.apply", noise, compat))


def undo() -> None:
    """Put the library's own methods back; posteriors made meanwhile go on to work."""
    _patch.undo()


def applied(noise: str = "fused", compat: bool = False) -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads; arguments as there."""
    return _patch.applied(checked_options("diffusers.applied", noise, compat))


def _replacements() -> list[Replacement]:
    vae = peer("diffusers", "diffusers", "diffusers.models.autoencoders.vae")
    cls = vae.DiagonalGaussianDistribution
    return posterior_replacements("diffusers", cls, _patch, takes_generator=True)


_patch: Patch[Options] = Patch(_replacements, DEFAULT)
