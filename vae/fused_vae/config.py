"""What defines a run: everything that its result depends on, and nothing else (threads and device
are not in it).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from .data import BUILT_IN, Images
from .errors import UserError
from .model import VAE, GaussianLikelihood, Variance
from .networks import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder

Network = Literal["conv", "mlp"]
Precision = Literal["float32", "bfloat16"]

STEPS_WANTED = 900
"""How long the default trains: 20 epochs of 45 batches on MNIST's 4500 digits; longer starts to
overfit them.
"""
MAX_DEFAULT_EPOCHS = 60


@dataclass(frozen=True)
class TrainConfig:
    """The options of ``fused-vae train``. ``epochs`` and ``batch_size`` of 0 mean: chosen from the
    number of images.
    """

    data: str = "mnist"
    network: Network = "conv"
    latent: int = 10
    variance: Variance = "learned"
    sigma: float = 0.25
    beta: float = 1.0
    epochs: int = 0
    batch_size: int = 0
    lr: float = 2e-3
    held_out: float = 0.1
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, choices in (
            ("network", Network),
            ("variance", Variance),
            ("precision", Precision),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise UserError(
                    f"--{name} must be one of {', '.join(get_args(choices))}, got {value}"
                )
        for name, least in (("latent", 1), ("epochs", 0), ("batch_size", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{_option(name)} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("sigma", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"{_option(name)} must be a positive number, got {getattr(self, name)}"
                )
        if not 0 <= self.beta < math.inf:
            raise UserError(f"--beta must be at least 0, got {self.beta}")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out must lie between 0 and 1, got {self.held_out}")
        if self.seed >= 2**63:
            raise UserError(f"--seed must be below 2**63, got {self.seed}")

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
        data = self.data if self.data in BUILT_IN else str(Path(self.data).resolve())
        return replace(self, data=data, epochs=epochs, batch_size=batch_size)

    def build(self, images: Images) -> VAE:
        """The untrained model for pictures like these."""
        likelihood = GaussianLikelihood(
            self.variance, self.sigma, bounded=True, floor=images.rounding_error
        )
        encoder, decoder = (
            (conv_encoder, conv_decoder) if self.network == "conv" else (mlp_encoder, mlp_decoder)
        )
        try:
            return VAE(
                encoder(images.shape, self.latent),
                decoder(images.shape, self.latent, outputs=likelihood.outputs),
                likelihood,
            )
        except ValueError as error:
            raise UserError(f"--network {self.network}: {error}") from error

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
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{_option(k)} {theirs[k]} (the run has {mine[k]})"
            for k in mine
            if mine[k] != theirs[k]
        ]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def dumps(value: Any) -> str:
    """JSON as a person reads it."""
    return json.dumps(value, indent=2) + "\n"
