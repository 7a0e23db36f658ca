"""A run's random numbers: each purpose has its own, named by the seed and a path."""

from __future__ import annotations

import numpy as np
import torch

NOISE_TRAIN, NOISE_EVALUATE, NOISE_PICTURES, NOISE_STUDY = range(4)
"""What the run's noise key is folded with first, so that they never share noise."""

SHUFFLE, DEQUANTISE, DEQUANTISE_HELD_OUT, INITIALISE = range(4)
"""What follows the seed in `seeded`."""


def seeded(*path: int) -> torch.Generator:
    """A generator for one purpose, e.g. ``seeded(seed, SHUFFLE, epoch)``; different paths are
    independent.
    """
    state = np.random.SeedSequence(path).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


SHUFFLE, DEQUANTISE, DEQUANTISE_HELD_OUT, INITIALISE = range(4)
