"""How the training step uses an objective.

A step has two halves. `Recipe.parts` runs the model on this rank's images; it is compiled and
distributed with the model. `Recipe.loss` makes one number of the parts of the whole batch. An
objective that is a mean over images has its loss in the parts already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fused_elbo import NoiseKey

from .architecture import Architecture, Model
from .data import Images
from .distributed import Ranks
from .errors import UserError

Parts = dict[str, Tensor]
"""``log_likelihood`` and ``kl`` ``[B]``, for the log, and what the objective needs beside."""


@dataclass(frozen=True)
class Batch:
    """What a loss may depend on beside the parts."""

    size: int  # images in the whole batch
    event: int  # numbers per image
    data_size: int  # number of training images
    key: NoiseKey  # of this step
    ranks: Ranks
    price: float = 1.0  # of this step


@dataclass
class Recipe:
    """One objective. The fields of a subclass are its options on the command line.

    ``has_beta``: whether ``--beta`` and ``--warm-up`` apply.
    ``gaussian_posterior``, ``standard_prior``, ``one_layer``: why it needs them; empty: it does
    not.
    """

    has_beta: ClassVar[bool] = False
    gaussian_posterior: ClassVar[str] = ""
    standard_prior: ClassVar[str] = ""
    one_layer: ClassVar[str] = ""

    def fit(self, model: Architecture) -> None:
        """Refuse a model that the objective has no meaning for.

        Raises:
            UserError: in one line.
        """
        for reason, fits, needs in (
            (self.gaussian_posterior, model.flow == "none", "--flow none"),
            (self.standard_prior, model.prior == "standard", "--prior standard"),
            (self.one_layer, not model.hierarchical, "--network conv or mlp"),
        ):
            if reason and not fits:
                raise UserError(f"this --objective needs {needs}: {reason}")

    def check(self, model: Architecture) -> None:
        """Refuse options out of range, or that do not fit the model.

        Raises:
            UserError: in one line.
        """

    def prepare(self, model: Model, images: Images) -> None:
        """Called once, before training on these images."""

    def price(self, beta: float, step: int) -> float:
        """The number that `parts` is given at this step; `beta` after warm-up."""
        return beta

    def weight(self, price: float) -> float:
        """What one nat of rate costs in nats of distortion, for the log."""
        return 1.0

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        """Of the images ``[b, *event]`` of this rank."""
        raise NotImplementedError

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """``[]``; over ranks, its gradients add up to the gradient of the objective."""
        return parts["loss"] * batch.ranks.share(batch.size)

    def advance(self, model: Model) -> None:
        """Called after an update of the parameters."""

    def state(self) -> dict[str, Any]:
        """What changes in training, for the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


def option(default: Any, text: str) -> Any:
    """A field of a recipe, and what the command line's help says of it."""
    return field(default=default, metadata={"help": text})


def flag(name: str) -> str:
    """An option as a user writes it."""
    return "--" + name.replace("_", "-")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse an option below its least value, or not finite.

    Raises:
        UserError: naming the option.
    """
    if not least <= value < math.inf:
        raise UserError(f"{flag(name)} must be at least {least}, got {value}")
