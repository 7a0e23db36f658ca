"""latent-diffusion and generative-models: their regularizer, and their posterior on the kernels.

    from fused_elbo.integrations.ldm import DiagonalGaussianRegularizer

stands in for the class of that name (in a configuration: ``target:
fused_elbo.integrations.ldm.DiagonalGaussianRegularizer``), and

    from fused_elbo.integrations import ldm

    ldm.apply(DiagonalGaussianDistribution)

replaces the methods of the posterior class of such a code base, as
`fused_elbo.integrations.diffusers` does for diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..gaussian import DiagonalGaussian
from ._patching import Patch, PatchByOwner, Replacement
from ._posterior import DEFAULT, Options, checked_options, posterior_replacements

__all__ = ["DiagonalGaussianRegularizer", "applied", "apply", "undo"]


class DiagonalGaussianRegularizer(nn.Module):
    """Samples the latent and returns its KL from N(0, I), in one kernel.

    Args:
        sample: draw z; False: z is the mean.

    Equivalent to::

        mean, logvar = z.chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
        z, log = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean), {"kl_loss": kl.mean()}
    """

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.sample = sample

    def get_trainable_parameters(self) -> Iterator[Any]:
        """None: there are no parameters to train."""
        yield from ()

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z: moments ``[B, 2 * C, *rest]``.

        Returns:
            ``(z, {"kl_loss": kl})``: z ``[B, C, *rest]``; kl in nats, summed over the event and
            averaged over the batch, float32 (float64 for float64).
        """
        posterior = DiagonalGaussian.from_moments(z)
        if self.sample:
            drawn, kl = posterior.sample_kl(reduction="batchmean")
            return drawn, {"kl_loss": kl}
        return posterior.mode(), {"kl_loss": posterior.kl(reduction="batchmean")}

    def extra_repr(self) -> str:
        return f"sample={self.sample}"


def apply(*classes: type, noise: str = "fused", compat: bool = False) -> None:
    """Replace the methods of posterior classes, each named ``DiagonalGaussianDistribution`` in its
    code base, for the whole process, until `undo`.

    Args:
        classes: one or more; their ``sample`` takes no argument.
        noise, compat: as in `fused_elbo.integrations.diffusers.apply`.

    Raises:
        RuntimeError: a class whose methods take other arguments; none has been replaced then.
        TypeError, ValueError: no class, or an option that does not exist.
    """
    _patches.apply(_checked("ldm.apply", classes), checked_options("ldm.apply", noise, compat))


def undo(*classes: type) -> None:
    """Put the own methods of these classes back; without arguments, of all."""
    _patches.undo(classes)


def applied(
    *classes: type, noise: str = "fused", compat: bool = False
) -> AbstractContextManager[None]:
    """`apply` for the length of a ``with`` block, in all threads; arguments as there."""
    return _patches.applied(
        _checked("ldm.applied", classes), checked_options("ldm.applied", noise, compat)
    )


def _checked(function: str, classes: tuple[Any, ...]) -> tuple[type, ...]:
    if not classes:
        raise TypeError(f"{function}: name the class to replace, DiagonalGaussianDistribution")
    for cls in classes:
        if not isinstance(cls, type):
            raise TypeError(f"{function}: expected classes, got {type(cls).__name__}")
    return classes


def _replacements(cls: Any, patch: Patch[Options]) -> list[Replacement]:
    return posterior_replacements("ldm", cls, patch, takes_generator=False)


_patches: PatchByOwner[Options] = PatchByOwner(_replacements, DEFAULT)
