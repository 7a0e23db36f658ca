"""Several processes training one model, as torchrun starts them.

Every rank holds the whole model and a slice of every batch. Objectives see the parts of all images
(`Ranks.gather`), with gradient through those of this rank, and noise is named by the position in
the whole batch. So the number of ranks changes nothing but the order in which gradients are added.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from .errors import TrainingError, UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; ``Ranks()`` is alone."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this rank prints and writes files: one of them does."""
        return self.rank == 0

    def part(self, batch: int, rank: int | None = None) -> slice:
        """The images of a batch that a rank (default: this one) works on; sizes differ by at most
        one.
        """
        rank = self.rank if rank is None else rank
        return slice(rank * batch // self.size, (rank + 1) * batch // self.size)

    def share(self, batch: int) -> float:
        """Which part of a batch this rank works on."""
        mine = self.part(batch)
        return float(mine.stop - mine.start) / batch

    def gather(self, mine: Tensor, batch: int) -> Tensor:
        """``[batch, ...]`` from the ``[b, ...]`` of every rank, with gradient to this rank's rows.

        Every rank computes the same loss from it, and the gradient of that loss is the *sum* of
        the gradients that the ranks obtain.
        """
        if self.size == 1:
            return mine
        parts = [self.part(batch, rank) for rank in range(self.size)]
        longest = max(p.stop - p.start for p in parts)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine.detach()
        received = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(received, padded)
        rows = [r[: p.stop - p.start] for r, p in zip(received, parts)]
        rows[self.rank] = mine
        return torch.cat(rows)

    def gather_objects(self, mine: Any) -> list[Any]:
        """One picklable object per rank, in their order."""
        if self.size == 1:
            return [mine]
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, mine)
        return objects

    def any(self, mine: Tensor) -> bool:
        """Whether a 0-dim boolean is true on some rank."""
        if self.size > 1:
            mine = mine.to(torch.uint8)
            dist.all_reduce(mine, dist.ReduceOp.MAX)
        return bool(mine)


def launched() -> bool:
    """Whether torchrun (or another launcher with its environment) started this process beside
    others.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def this_rank() -> int:
    """This process's number among them; 0 when alone."""
    return int(os.environ["RANK"]) if launched() else 0


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Meet the other ranks (gloo for the CPU, NCCL for GPUs), and part from them at the end.

    An error on one rank ends all: the others lose their connection, or are ended by the launcher.

    Raises:
        UserError: this torch has no collectives, or the others cannot be reached.
        TrainingError: another rank is gone.
    """
    if not launched():
        yield Ranks()
        return
    if not dist.is_available():
        raise UserError("torchrun: this torch is built without torch.distributed")
    ranks = Ranks(this_rank(), int(os.environ["WORLD_SIZE"]))
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(),
            rank=ranks.rank,
            world_size=ranks.size,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"torchrun: cannot reach the other ranks ({error})") from error
    try:
        yield ranks
    except BaseException as error:
        first_to_fail()  # before the others notice
        if (type(error) is RuntimeError and "gloo" in str(error)) or isinstance(
            error, dist.DistError
        ):
            raise TrainingError("another rank is gone; --resume continues") from error
        raise
    finally:
        with contextlib.suppress(RuntimeError):  # the connection may be gone
            dist.destroy_process_group()


@functools.cache
def first_to_fail() -> bool:
    """Whether this rank is the one that says why all of them end; asked only on failure."""
    if not launched():
        return True
    try:
        return int(_store().add("fused_vae/failures", 1)) == 1
    except (RuntimeError, ValueError, OSError):  # whoever held the store is gone
        return True


@functools.cache
def _store() -> Any:
    """Where the ranks meet: with torchrun in its own process, so that it outlives any rank."""
    return next(rendezvous("env://", this_rank(), int(os.environ["WORLD_SIZE"])))[0]
