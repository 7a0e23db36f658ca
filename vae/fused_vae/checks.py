"""Arguments that several model parts check in the same way, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor


def positive(function: str, **sizes: int) -> None:
    """Raise ValueError for the first that is not a positive whole number."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{function}: {name} must be a positive whole number, got {size!r}")


def latent_vectors(function: str, z: Tensor, latent: int) -> None:
    """Raise ValueError unless `z` is ``[..., latent]``."""
    if z.dim() < 2 or z.shape[-1] != latent:
        raise ValueError(f"{function}: z must have shape [..., {latent}], got {tuple(z.shape)}")


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: log-determinants are nats, and nats are never summed in half
    precision.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
