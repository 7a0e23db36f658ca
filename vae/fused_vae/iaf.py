"""Inverse autoregressive flow (arXiv:1606.04934): all dimensions at once on the way forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import latent_vectors, positive, wide
from .flows import Flow

S_AT_START = 2.0
"""The paper starts between 1 and 2: a gate that is nearly open."""


class MaskedNetwork(nn.Module):
    """Output pair d of one hidden layer sees z_1 .. z_(d-1) only (MADE, arXiv:1502.03509).

    Args:
        latent: dimensions of z; the outputs are 2 * latent numbers, m then s.
        hidden: units; unit j sees the first j mod latent dimensions.
        backwards: count the dimensions from the last to the first.
    """

    inputs_mask: Tensor
    outputs_mask: Tensor

    def __init__(self, latent: int, hidden: int, *, backwards: bool) -> None:
        super().__init__()
        order = torch.arange(latent).flip(0) if backwards else torch.arange(latent)
        sees = torch.arange(hidden) % latent
        self.inputs = nn.Linear(latent, hidden)
        self.outputs = nn.Linear(hidden, 2 * latent)
        nn.init.constant_(self.outputs.bias[latent:], S_AT_START)
        self.register_buffer("inputs_mask", order < sees[:, None], persistent=False)
        both = (sees <= order[:, None]).repeat(2, 1)
        self.register_buffer("outputs_mask", both, persistent=False)

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and s, each ``[..., latent]``; `context` ``[B, hidden]`` is added to the units."""
        hidden = F.linear(z, self.inputs.weight * self.inputs_mask, self.inputs.bias)
        hidden = F.elu(hidden if context is None else hidden + context)
        outputs = F.linear(hidden, self.outputs.weight * self.outputs_mask, self.outputs.bias)
        m, s = wide(outputs).chunk(2, -1)
        return m, s


class InverseAutoregressiveFlow(Flow):
    """z <- sigmoid(s) z + (1 - sigmoid(s)) m, with (m, s) of dimension d computed from z_1 ..
    z_(d-1) (arXiv:1606.04934, equations 13 and 14).

        log |det| = sum_d log sigmoid(s_d)

    The order of the dimensions alternates from step to step; s starts near `S_AT_START`,
    where a step changes little.

    Args:
        latent: dimensions of z.
        steps: how many times.
        hidden: units of each step's masked network; at least `latent`, so that all are seen.
        context: maps x to ``[B, steps * hidden]``, the paper's h, added to the hidden units of each
            step. To compute it with q_0, give both networks the same trunk. None: no h.

    Raises:
        ValueError: a size that is not positive, a z that is not ``[..., latent]``.
    """

    def __init__(
        self, latent: int, steps: int = 2, hidden: int = 64, context: nn.Module | None = None
    ) -> None:
        super().__init__()
        positive("InverseAutoregressiveFlow", latent=latent, steps=steps, hidden=hidden)
        self.latent = latent
        self.context = context
        self.steps = nn.ModuleList(
            MaskedNetwork(latent, hidden, backwards=step % 2 == 1) for step in range(steps)
        )

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Flow`."""
        latent_vectors("InverseAutoregressiveFlow", z, self.latent)
        z = wide(z)
        log_det = torch.zeros_like(z[..., 0])
        for step, context in zip(self.steps, self._contexts(x)):
            m, s = step(z, context)
            z = s.sigmoid() * z + (1 - s.sigmoid()) * m
            log_det = log_det + F.logsigmoid(s).sum(-1)
        return z, log_det

    def _contexts(self, x: Tensor) -> Sequence[Tensor | None]:
        if self.context is None:
            return (None,) * len(self.steps)
        found: Tensor = self.context(x)
        return found.chunk(len(self.steps), -1)

    @torch.no_grad()
    def inverse(self, z: Tensor, x: Tensor) -> Tensor:
        """See `Flow`. One dimension after the other: the first is known at once, and each pass
        through the network makes one more right.
        """
        latent_vectors("InverseAutoregressiveFlow", z, self.latent)
        z = wide(z)
        for step, context in reversed(list(zip(self.steps, self._contexts(x)))):
            z_0 = torch.zeros_like(z)
            for _ in range(self.latent):
                m, s = step(z_0, context)
                z_0 = (z - (1 - s.sigmoid()) * m) / s.sigmoid()
            z = z_0
        return z
