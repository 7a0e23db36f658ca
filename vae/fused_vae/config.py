"""What defines a run: everything that its result depends on, and nothing else (threads and device
are not in it).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from . import objective_options, objectives
from .architecture import Architecture, FlowName, Model, NetworkName, PriorName
from .data import BUILT_IN, Images
from .errors import UserError
from .likelihoods import Variance
from .recipe import Recipe, flag

Precision = Literal["float32", "bfloat16"]
WarmUp = Literal["none", "linear", "cosine", "cyclical"]

STEPS_WANTED = 900
"""How long the default trains: 20 epochs of 45 batches on MNIST's 4500 digits; longer starts to
overfit them.
"""
MAX_DEFAULT_EPOCHS = 60

LAYERS = 3
"""Stochastic layers of ``--network hierarchy``."""

RISE = 0.2
"""Share of the steps over which the default warm-up rises."""
CYCLES = 4
"""Of the default cyclical warm-up, as in arXiv:1903.10145."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of ``fused-vae train``. ``epochs``, ``batch_size`` and ``warm_up_steps`` of 0
    mean: chosen from the number of images. ``layers`` is 0 but for ``--network hierarchy``, whose
    layers share the ``latent`` dimensions.

    ``compile`` is among them because compiled code rounds otherwise.
    """

    data: str = "mnist"
    network: NetworkName = "conv"
    latent: int = 10
    layers: int = 0
    flow: FlowName = "none"
    prior: PriorName = "standard"
    variance: Variance = "learned"
    sigma: float = 0.25
    objective: str = "elbo"
    objective_options: dict[str, Any] = field(default_factory=dict)
    beta: float = 1.0
    warm_up: WarmUp = "none"
    warm_up_steps: int = 0
    epochs: int = 0
    batch_size: int = 0
    lr: float = 2e-3
    held_out: float = 0.1
    seed: int = 0
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("network", NetworkName),
            ("flow", FlowName),
            ("prior", PriorName),
            ("variance", Variance),
            ("precision", Precision),
            ("warm_up", WarmUp),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise UserError(
                    f"{flag(name)} must be one of {', '.join(get_args(choices))}, got {value}"
                )
        for name, least in (
            ("latent", 1),
            ("layers", 0),
            ("epochs", 0),
            ("batch_size", 0),
            ("warm_up_steps", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")
        for name in ("sigma", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"{flag(name)} must be a positive number, got {getattr(self, name)}"
                )
        if not 0 <= self.beta < math.inf:
            raise UserError(f"--beta must be at least 0, got {self.beta}")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out must lie between 0 and 1, got {self.held_out}")
        if self.seed >= 2**63:
            raise UserError(f"--seed must be below 2**63, got {self.seed}")
        self._check_architecture()
        self._check_objective()

    def _check_architecture(self) -> None:
        """And fill in the number of layers."""
        if self.network != "hierarchy":
            if self.layers:
                raise UserError("--layers needs --network hierarchy")
            return
        for name, plain in (("flow", "none"), ("prior", "standard")):
            if getattr(self, name) != plain:
                raise UserError(f"{flag(name)} has no meaning with --network hierarchy")
        object.__setattr__(self, "layers", self.layers or min(LAYERS, self.latent))
        if self.layers > self.latent:
            raise UserError(
                f"--layers {self.layers} is more than the {self.latent} latent dimensions"
            )

    def _check_objective(self) -> None:
        """And fill in the options of the objective that were left out."""
        recipe = self.recipe()
        object.__setattr__(self, "objective_options", asdict(recipe))
        for name, default in (("beta", 1.0), ("warm_up", "none")):
            if getattr(self, name) != default and not recipe.has_beta:
                raise UserError(f"{flag(name)} has no meaning with --objective {self.objective}")
        if self.objective == "balanced" and self.warm_up == "none" and self.beta >= 1:
            raise UserError(
                "--objective balanced acts while beta is below 1: give --warm-up linear, cosine or"
                " cyclical"
            )
        if self.warm_up == "none" and self.warm_up_steps:
            raise UserError("--warm-up-steps needs --warm-up linear, cosine or cyclical")

    def recipe(self) -> Recipe:
        """The objective, as at the start of training."""
        return objective_options.build(self.objective, self.objective_options, self.architecture())

    def architecture(self) -> Architecture:
        """The model, for images of any size."""
        layers = self.layers or 1
        ends = [self.latent * layer // layers for layer in range(layers + 1)]
        latents = tuple(end - start for start, end in zip(ends, ends[1:]))
        return Architecture(self.network, latents, self.variance, self.sigma, self.flow, self.prior)

    def beta_at(self, step: int) -> float:
        """Beta after warm-up; a pure function of the step, so that resuming needs no state."""
        if self.warm_up == "linear":
            return self.beta * objectives.linear_warm_up(step, self.warm_up_steps)
        if self.warm_up == "cosine":
            return self.beta * objectives.cosine_warm_up(step, self.warm_up_steps)
        if self.warm_up == "cyclical":
            return self.beta * objectives.cyclical_warm_up(step, self.warm_up_steps)
        return self.beta

    def resolved(self, train: Images) -> TrainConfig:
        """The same with every automatic choice made, and a path that holds from any working
        directory.
        """
        batch_size = self.batch_size or min(100, max(1, len(train) // 3))
        if batch_size > len(train):
            raise UserError(
                f"--batch-size {batch_size} is more than the {len(train)} training images"
            )
        epochs = self.epochs or min(
            MAX_DEFAULT_EPOCHS, math.ceil(STEPS_WANTED / (len(train) // batch_size))
        )
        steps = epochs * (len(train) // batch_size)
        warm_up_steps = self.warm_up_steps
        if self.warm_up != "none" and not warm_up_steps:
            share = 1 / CYCLES if self.warm_up == "cyclical" else RISE
            warm_up_steps = max(1, round(share * steps))
        data = self.data if self.data in BUILT_IN else str(Path(self.data).resolve())
        return replace(
            self, data=data, epochs=epochs, batch_size=batch_size, warm_up_steps=warm_up_steps
        )

    def build(self, images: Images) -> Model:
        """The untrained model for the training pictures."""
        return self.architecture().build(images)

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise UserError(
                f"config.json has options this version does not know: {', '.join(sorted(unknown))}"
            )
        return cls(**values)

    def differences(self, other: TrainConfig) -> list[str]:
        """The options in which `other` differs, as a user writes them."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{flag(k)} {theirs[k]} (the run has {mine[k]})"
            for k in mine
            if k in theirs and mine[k] != theirs[k]
        ]

    def _flat(self) -> dict[str, Any]:
        values = self.to_dict()
        values |= values.pop("objective_options")
        return values


def dumps(value: Any) -> str:
    """JSON as a person reads it."""
    return json.dumps(value, indent=2) + "\n"
