"""Small runs on scikit-learn's digits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_vae.config import TrainConfig
from fused_vae.data import Images
from fused_vae.train import Trainer


def trainer(digits: tuple[Images, Images], **options: Any) -> Trainer:
    options = {"data": "digits", "network": "mlp", "latent": 4, "epochs": 2, **options}
    return Trainer(TrainConfig(**options).resolved(digits[0]), *digits)


def train(job: Trainer, epochs: int | None = None) -> dict[str, Tensor]:
    """The model's tensors after so many epochs, or all of them."""
    for number, steps in enumerate(job.epochs(), start=1):
        for _ in steps:
            pass
        if number == epochs:
            break
    return {k: v.clone() for k, v in job.model.state_dict().items()}
