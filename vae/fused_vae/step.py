"""The half of a training step that runs the model: from images to the parts of an objective. It may
be compiled, and its gradients shared between ranks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_elbo import NoiseKey

from .architecture import Model
from .distributed import Ranks
from .errors import UserError
from .recipe import Parts, Recipe


class Step(nn.Module):
    """Runs `Recipe.parts` on this rank's images, in the precision of the run.

    Args:
        model: trained in place; its state is not wrapped.
        recipe: the objective.
        ranks: gradients are averaged over them.
        compiled: one graph of the whole forward pass. What changes from step to step enters it as
            a tensor, so that it is compiled once.
        low_precision: bfloat16 autocast.
    """

    def __init__(
        self, model: Model, recipe: Recipe, ranks: Ranks, *, compiled: bool, low_precision: bool
    ) -> None:
        super().__init__()
        self.device = next(model.parameters()).device
        self.compiled = compiled
        self.low_precision = low_precision
        self._forward: nn.Module = _Parts(model, recipe)
        if compiled:
            self._forward.compile(fullgraph=True, dynamic=False)
        if ranks.size > 1:
            self._forward = DistributedDataParallel(
                self._forward,
                device_ids=[self.device] if self.device.type == "cuda" else None,
            )

    def forward(self, x: Tensor, key: NoiseKey, price: float) -> Parts:
        """Of the images ``[b, *event]``.

        Raises:
            UserError: compiling failed.
        """
        seed: Any = key.seed
        number: Any = price
        if self.compiled:
            seed = torch.tensor(seed, device=self.device)
            number = torch.tensor(number, device=self.device)
        with self.autocast():
            if not self.compiled:
                return cast(Parts, self._forward(x, seed, key.row_offset, number))
            from torch._dynamo.exc import TorchDynamoException

            try:
                return cast(Parts, self._forward(x, seed, key.row_offset, number))
            except TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"--compile: torch cannot compile the model ({reason})") from error

    def autocast(self) -> torch.autocast:
        """The precision that every pass of this run uses."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.low_precision)


class _Parts(nn.Module):
    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe

    def forward(self, x: Tensor, seed: Any, row: int, price: Any) -> Parts:
        return self.recipe.parts(self.model, x, NoiseKey(seed, row_offset=row), price)
