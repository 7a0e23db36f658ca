"""The training loop: every random number in it is a function of the seed and the step, so that a
run repeats bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey, tracing

from .config import TrainConfig
from .data import Images
from .errors import TrainingError
from .model import VAE, VAEOutput

NOISE_TRAIN, NOISE_EVALUATE, NOISE_PICTURES = range(3)
"""What the run's noise key is folded with first, so that the three never share noise."""

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


def seeded(*path: int) -> torch.Generator:
    """A generator for one purpose, e.g. ``seeded(seed, SHUFFLE, epoch)``; different paths are
    independent.
    """
    state = np.random.SeedSequence(path).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


SHUFFLE, DEQUANTISE, DEQUANTISE_HELD_OUT, INITIALISE = range(4)


class Trainer:
    """Trains one model; `epochs` yields after each epoch, with `progress.history[-1]` filled in.

    Args:
        config: resolved (`TrainConfig.resolved`).
        train, held_out: the images.
        device: where the model runs.
    """

    def __init__(
        self,
        config: TrainConfig,
        train: Images,
        held_out: Images,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.images = train
        self.device = torch.device(device)
        self.key = NoiseKey(config.seed)
        self.steps_per_epoch = len(train) // config.batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(config.seed, INITIALISE).initial_seed())
            self.model = config.build(train).to(self.device)
        self.optimizer = torch.optim.Adam(self._parameter_groups(), betas=(0.9, 0.99))
        self.progress = Progress()
        self.x_held_out = held_out.dequantise(seeded(config.seed, DEQUANTISE_HELD_OUT)).to(
            self.device
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        logvar = self.model.likelihood.logvar
        weights = [p for p in self.model.parameters() if p is not logvar]
        groups: list[dict[str, Any]] = [{"params": weights, "speed": 1.0}]
        if isinstance(logvar, nn.Parameter):
            groups.append({"params": [logvar], "speed": SIGMA_SPEED})
        return groups

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def epochs(self) -> Iterator[Iterator[VAEOutput]]:
        """The epochs that remain, each as an iterator over its steps."""
        while self.progress.epoch < self.config.epochs:
            yield self._epoch()

    def _epoch(self) -> Iterator[VAEOutput]:
        started = time.perf_counter()
        epoch = self.progress.epoch
        totals = torch.zeros(2, dtype=torch.float64)
        for x in self._batches(epoch):
            out = self.step(x)
            totals += torch.stack([out.kl.double().sum(), -out.log_likelihood.double().sum()]).cpu()
            yield out
        rate, distortion = (totals / (self.steps_per_epoch * self.config.batch_size)).tolist()
        distortion += self.images.nats_per_density
        row = {"epoch": epoch + 1, "step": self.progress.step, **self.evaluate()}
        row |= {
            "train_elbo": -rate - distortion,
            "train_rate": rate,
            "train_distortion": distortion,
        }
        row["seconds"] = round(time.perf_counter() - started, 2)
        self.progress.history.append(row)
        self.progress.epoch = epoch + 1

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """The images of one epoch in a random order; those that do not fill the last batch wait for
        another epoch.
        """
        size = self.config.batch_size
        order = torch.randperm(len(self.images), generator=seeded(self.config.seed, SHUFFLE, epoch))
        for index in range(self.steps_per_epoch):
            with tracing.range("data"):
                batch = self.images.select(order[index * size : (index + 1) * size])
                x = batch.dequantise(seeded(self.config.seed, DEQUANTISE, self.progress.step))
                x = x.to(self.device)
            yield x

    def step(self, x: Tensor) -> VAEOutput:
        """One update of the parameters.

        Raises:
            TrainingError: the loss is not finite; nothing was updated.
        """
        step = self.progress.step
        key = self.key.fold_in(NOISE_TRAIN).fold_in(step)
        self.model.train()
        out = self._forward(x, key)
        if not math.isfinite(out.loss.item()):
            raise TrainingError(f"step {step}: {self._diagnose(x, key)}")
        with tracing.range("backward"):
            self.optimizer.zero_grad()
            out.loss.backward()
        with tracing.range("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * group["speed"] * self._schedule(step)
            self.optimizer.step()
        self.progress.step = step + 1
        return out

    def _forward(self, x: Tensor, key: NoiseKey) -> VAEOutput:
        low = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            out: VAEOutput = self.model(x, key=key, beta=self.config.beta)
        return out

    def _schedule(self, step: int) -> float:
        """Share of the full learning rate: a pure function of the step, so that resuming needs no
        state.
        """
        warm_up = max(1, round(WARM_UP * self.total_steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, self.total_steps - warm_up))

    def _diagnose(self, x: Tensor, key: NoiseKey) -> str:
        """Which layer first gave a number that is not finite."""
        culprit: list[str] = []

        def watch(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not culprit and not output.isfinite().all():
                    culprit.append(name)

            return hook

        leaves = [(n, m) for n, m in self.model.named_modules() if not any(m.children())]
        handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
        try:
            with torch.no_grad():
                out = self._forward(x, key)
        finally:
            for handle in handles:
                handle.remove()
        rows = (~(out.elbo.isfinite())).nonzero().flatten().tolist()
        where = f"first in layer {culprit[0]}" if culprit else "first in the loss itself"
        return (
            f"the loss became {out.loss.item()}, {where}, for {len(rows)} of {len(x)} images of the"
            " batch; a lower --lr or another --variance may help"
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out averages in nats per stored image, with the same noise at every call."""
        self.model.eval()
        key = self.key.fold_in(NOISE_EVALUATE)
        size = self.config.batch_size
        parts = [
            self._forward(x, key.rows(index * size))
            for index, x in enumerate(self.x_held_out.split(size))
        ]
        rate = float(torch.cat([p.kl for p in parts]).double().mean())
        distortion = -float(torch.cat([p.log_likelihood for p in parts]).double().mean())
        distortion += self.images.nats_per_density
        elbo = -rate - distortion
        row = {"elbo": elbo, "rate": rate, "distortion": distortion}
        row["bits_per_dim"] = -elbo / math.log(2) / math.prod(self.images.shape)
        row["sigma"] = self.sigma()
        return row

    @torch.no_grad()
    def log_prob(self, num_samples: int) -> float:
        """Held-out importance-weighted bound on log P(x), nats per stored image."""
        self.model.eval()
        key = self.key.fold_in(NOISE_EVALUATE)
        size = self.config.batch_size
        parts = [
            self.model.log_prob(x, num_samples, key=key.rows(index * size), chunk=10)
            for index, x in enumerate(self.x_held_out.split(size))
        ]
        return float(torch.cat(parts).double().mean()) - self.images.nats_per_density

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


def load_model(model: VAE, tensors: dict[str, Tensor]) -> None:
    """Put the model's tensors of a checkpoint in their place."""
    prefix = "model."
    model.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
