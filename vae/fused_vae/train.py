"""The training loop: every random number in it is a function of the seed, the step and the position
in the batch, so that a run repeats bit for bit, and is the same on any number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey, tracing

from . import diagnosis
from .architecture import Model
from .config import TrainConfig
from .data import Images
from .distributed import Ranks
from .errors import TrainingError, UserError
from .hierarchy import HierarchicalVAE
from .randomness import (
    DEQUANTISE,
    DEQUANTISE_HELD_OUT,
    INITIALISE,
    NOISE_EVALUATE,
    NOISE_TRAIN,
    SHUFFLE,
    seeded,
)
from .recipe import Batch, Parts
from .step import Step

WARM_UP = 0.1
"""Share of the steps over which the learning rate rises; it then falls along a cosine."""

SIGMA_SPEED = 5.0
"""How much faster than the weights the learned log-variance moves: it alone has far to go."""


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds beside tensors."""

    step: int = 0
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains one model; `epochs` yields after each epoch, with `progress.history[-1]` filled in.

    Args:
        config: resolved (`TrainConfig.resolved`).
        train, held_out: the images.
        device: where the model runs.
        ranks: the processes that train it together; each calls every method.

    Raises:
        UserError: fewer images in a batch than ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        train: Images,
        held_out: Images,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.images = train
        self.device = torch.device(device)
        self.ranks = ranks or Ranks()
        if config.batch_size < self.ranks.size:
            raise UserError(
                f"--batch-size {config.batch_size} is less than the {self.ranks.size} ranks"
            )
        self.key = NoiseKey(config.seed)
        self.steps_per_epoch = len(train) // config.batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(config.seed, INITIALISE).initial_seed())
            self.model = config.build(train).to(self.device)
        self.recipe = config.recipe()
        self.recipe.prepare(self.model, train)
        self.optimizer = torch.optim.Adam(self._parameter_groups(), betas=(0.9, 0.99))
        self._run_model = Step(
            self.model,
            self.recipe,
            self.ranks,
            compiled=config.compile,
            low_precision=config.precision == "bfloat16",
        )
        self.progress = Progress()
        self.x_held_out = held_out.dequantise(seeded(config.seed, DEQUANTISE_HELD_OUT)).to(
            self.device
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        logvar = self.model.likelihood.logvar
        weights = [p for p in self.model.parameters() if p is not logvar]
        groups: list[dict[str, Any]] = [{"params": weights, "speed": 1.0}]
        if isinstance(logvar, nn.Parameter) and logvar.requires_grad:
            groups.append({"params": [logvar], "speed": SIGMA_SPEED})
        return groups

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def epochs(self) -> Iterator[Iterator[Parts]]:
        """The epochs that remain, each as an iterator over its steps."""
        while self.progress.epoch < self.config.epochs:
            yield self._epoch()

    def _epoch(self) -> Iterator[Parts]:
        started = time.perf_counter()
        epoch = self.progress.epoch
        totals = torch.zeros(2, dtype=torch.float64)
        for x, numbers in self._batches(epoch):
            out = self.step(x, numbers)
            sums = out["kl"].double().sum(), -out["log_likelihood"].double().sum()
            totals += torch.stack(sums).detach().cpu()
            yield out
        if name := diagnosis.unusable_parameter(self.model):
            raise TrainingError(
                f"step {self.progress.step - 1}: the update made {name} unusable (not finite); a"
                " lower --lr may help"
            )
        totals = torch.stack(self.ranks.gather_objects(totals)).sum(0)
        rate, distortion = (totals / (self.steps_per_epoch * self.config.batch_size)).tolist()
        distortion += self.images.nats_per_density
        row = {"epoch": epoch + 1, "step": self.progress.step, **self.evaluate()}
        row |= {
            "train_elbo": -rate - distortion,
            "train_rate": rate,
            "train_distortion": distortion,
            "beta": self.recipe.weight(self._price(self.progress.step - 1)),
        }
        row["seconds"] = round(time.perf_counter() - started, 2)
        self.progress.history.append(row)
        self.progress.epoch = epoch + 1

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of one epoch in a random order, and their numbers in the data set; those that
        do not fill the last batch wait for another epoch. Of each batch, this rank's part.
        """
        size = self.config.batch_size
        part = self.ranks.part(size)
        order = torch.randperm(len(self.images), generator=seeded(self.config.seed, SHUFFLE, epoch))
        for index in range(self.steps_per_epoch):
            with tracing.range("data"):
                chosen = order[index * size : (index + 1) * size]
                batch = self.images.select(chosen)
                generator = seeded(self.config.seed, DEQUANTISE, self.progress.step)
                x = batch.dequantise(generator, part).to(self.device)
                numbers = chosen if batch.numbers is None else batch.numbers
            yield x, numbers[part]

    def step(self, x: Tensor, numbers: Tensor | None = None) -> Parts:
        """One update of the parameters.

        Args:
            x: this rank's part of the batch.
            numbers: what an error calls its images; default: their places in the part.

        Raises:
            TrainingError: the loss or its gradient is not finite; nothing was updated.
        """
        step = self.progress.step
        size = self.config.batch_size
        key = self.key.fold_in(NOISE_TRAIN).fold_in(step)
        rows = key.rows(self.ranks.part(size).start)
        price = self._price(step)
        before = self.recipe.state()
        self.model.train()
        parts: Parts = self._run_model(x, rows, price)
        batch = Batch(size, x[0].numel(), len(self.images), key, self.ranks, price)
        loss = self.recipe.loss(parts, batch)
        names = list(range(len(x))) if numbers is None else numbers.tolist()
        if self.ranks.any(~loss.detach().isfinite()):
            self.recipe.restore(before)

            def again() -> Parts:
                with self._run_model.autocast():
                    return self.recipe.parts(self.model, x, rows, price)

            found = diagnosis.forward_pass(self.model, again, loss.item(), names)
            self._fail("loss", found)
        with tracing.range("backward"):
            self.optimizer.zero_grad()
            # DistributedDataParallel averages over the ranks, the parts of the gradient add up.
            (loss * self.ranks.size if self.ranks.size > 1 else loss).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            self.recipe.restore(before)

            def alone(index: int) -> Tensor:
                with self._run_model.autocast():
                    out = self.model(x[index : index + 1], key=rows.rows(index))
                alone_loss: Tensor = out.loss
                return alone_loss

            found = diagnosis.backward_pass(self.model, alone, norm.item(), names)
            self.optimizer.zero_grad()
            self._fail("gradient", found)
        with tracing.range("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * group["speed"] * self._schedule(step)
            self.optimizer.step()
        self.recipe.advance(self.model)
        self.progress.step = step + 1
        return parts

    def _fail(self, what: str, found: diagnosis.Finding) -> NoReturn:
        findings = self.ranks.gather_objects(found)
        text = diagnosis.message(what, findings, self.config.batch_size)
        raise TrainingError(f"step {self.progress.step}: {text}")

    def _price(self, step: int) -> float:
        return self.recipe.price(self.config.beta_at(step), step)

    def _schedule(self, step: int) -> float:
        """Share of the full learning rate: a pure function of the step, so that resuming needs no
        state.
        """
        warm_up = max(1, round(WARM_UP * self.total_steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, self.total_steps - warm_up))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out averages in nats per stored image, with the same noise at every call: the ELBO
        and its parts, whatever was optimized; of several stochastic layers also the rate of each,
        ``rate_1`` that of the top.
        """

        def parts(x: Tensor, key: NoiseKey) -> Tensor:
            with self._run_model.autocast():
                out = self.model(x, key=key)
            layers = out.layer_kl if isinstance(self.model, HierarchicalVAE) else ()
            return torch.stack([out.kl, -out.log_likelihood, *layers], 1)

        rate, distortion, *layers = self._held_out(parts).mean(0).tolist()
        distortion += self.images.nats_per_density
        elbo = -rate - distortion
        row = {"elbo": elbo, "rate": rate, "distortion": distortion}
        row |= {f"rate_{layer}": nats for layer, nats in enumerate(layers, start=1)}
        row["bits_per_dim"] = -elbo / math.log(2) / math.prod(self.images.shape)
        row["sigma"] = self.sigma()
        return row

    @torch.no_grad()
    def log_prob(self, num_samples: int) -> float:
        """Held-out importance-weighted bound on log P(x), nats per stored image."""

        def bound(x: Tensor, key: NoiseKey) -> Tensor:
            return self.model.log_prob(x, num_samples, key=key)

        return float(self._held_out(bound).mean()) - self.images.nats_per_density

    def _held_out(self, measure: Callable[[Tensor, NoiseKey], Tensor]) -> Tensor:
        """``[N, ...]`` float64: of every held-out image. Ranks take whole batches, so that their
        number does not even change the rounding.
        """
        self.model.eval()
        key = self.key.fold_in(NOISE_EVALUATE)
        size = self.config.batch_size
        batches = list(enumerate(self.x_held_out.split(size)))
        mine = {
            index: measure(x, key.rows(index * size)).double().cpu()
            for index, x in batches[self.ranks.rank :: self.ranks.size]
        }
        found = {k: v for each in self.ranks.gather_objects(mine) for k, v in each.items()}
        return torch.cat([found[index] for index, _ in batches])

    def sigma(self) -> float:
        """The decoder's standard deviation; nan where it differs from pixel to pixel."""
        likelihood = self.model.likelihood
        if likelihood.variance == "predicted":
            return math.nan
        logvar = likelihood.logvar
        if isinstance(logvar, Tensor):
            logvar = logvar.item()
        return math.exp((logvar or 0.0) / 2)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and the rest, that `restore` takes."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        return tensors, {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "history": self.progress.history,
            "objective": self.recipe.state(),
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from there as if never stopped."""
        load_model(self.model, tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.progress = Progress(state["step"], state["epoch"], state["history"])
        self.recipe.restore(state.get("objective", {}))


def load_model(model: Model, tensors: dict[str, Tensor]) -> None:
    """Put the model's tensors of a checkpoint in their place."""
    prefix = "model."
    model.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
