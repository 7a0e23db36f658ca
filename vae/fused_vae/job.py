"""One ``fused-vae train``: data, baseline, epochs, and the run folder with everything a person
wants to look at.
"""

from __future__ import annotations

import csv
import functools
import math
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import data, distributed, plots, tensorboard
from .architecture import Model, sample
from .baseline import ProbabilisticPCA
from .config import TrainConfig
from .data import Images
from .distributed import Ranks
from .errors import UserError
from .machine import Machine, check_packages
from .networks import count_parameters
from .randomness import DEQUANTISE, NOISE_PICTURES, seeded
from .run_folder import CHECKPOINT, CONFIG, EARLY, METRICS, RunFolder, read_checkpoint, read_json
from .train import Trainer, load_model

IMPORTANCE_SAMPLES = 50
PICTURES = 16
SAMPLES = 100


def default_run(source: str) -> Path:
    """runs/ and the name of the data."""
    return Path("runs") / (
        source if source in data.BUILT_IN else Path(source).resolve().stem or "images"
    )


def start(run: str | Path, config: TrainConfig, machine: Machine, *, overwrite: bool) -> Path:
    """Train from the beginning; returns the run folder.

    Raises:
        UserError: bad data or options, or a run folder that is taken or cannot be written.
    """
    check_packages()
    device = machine.prepare()
    with distributed.joined(device) as ranks:
        images = data.load(config.data)
        train, held_out = images.split(config.held_out, config.seed)
        config = config.resolved(train)
        trainer = Trainer(config, train, held_out, device, ranks)
        folder = RunFolder(run)
        if ranks.writes:
            folder.create(overwrite=overwrite)
            folder.write_json(CONFIG, {"train": config.to_dict(), "images": _describe(images)})
        return _Job(folder, trainer, images, train, held_out, machine).run()


def resume(run: str | Path, options: dict[str, Any], machine: Machine) -> Path:
    """Continue an unfinished run from its last checkpoint, on any number of ranks; `options` may
    repeat the run's own, not change them.

    Raises:
        UserError: no such run, other options or other data than it was started with.
    """
    check_packages()
    device = machine.prepare()
    with distributed.joined(device) as ranks:
        folder = RunFolder(run)
        stored = folder.read_config()
        config = TrainConfig.from_dict(stored["train"])
        if changes := config.differences(_asked(config, options)):
            raise UserError(f"--resume continues a run as it was started: {'; '.join(changes)}")
        images = data.load(config.data)
        if stored["images"] != _describe(images):
            raise UserError(
                f"--resume: the images of {config.data} are not those that the run was started with"
            )
        train, held_out = images.split(config.held_out, config.seed)
        trainer = Trainer(config, train, held_out, device, ranks)
        if (folder.folder / CHECKPOINT).is_file():
            trainer.restore(*read_checkpoint(folder.folder))
        return _Job(folder, trainer, images, train, held_out, machine).run()


def _asked(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """The configuration of a run with these options in the place of its own."""
    values = {**config.to_dict(), **options}
    if values["objective"] == config.objective:
        own = config.objective_options
        values["objective_options"] = {**own, **options.get("objective_options", {})}
    elif "objective_options" not in options:
        values["objective_options"] = {}
    if values["network"] != config.network and "layers" not in options:
        values["layers"] = 0
    if values["data"] not in data.BUILT_IN:
        values["data"] = str(Path(values["data"]).resolve())
    return TrainConfig(**values)


def load_run(run: str | Path, checkpoint: str = CHECKPOINT) -> tuple[Model, TrainConfig, Images]:
    """The trained model of a run folder (`EARLY`: after one epoch), its configuration and images.

    Raises:
        UserError: not a run folder, or its data are gone.
    """
    folder = Path(run)
    stored = read_json(folder / CONFIG)
    config = TrainConfig.from_dict(stored["train"])
    images = data.load(config.data)
    model = config.build(images.split(config.held_out, config.seed)[0])
    load_model(model, read_checkpoint(folder, checkpoint)[0])
    return model.eval(), config, images


def _describe(images: Images) -> dict[str, Any]:
    """What the checkpoint fits, and a checksum that tells whether the data have changed."""
    return {
        "name": images.name,
        "count": len(images),
        "shape": list(images.shape),
        "levels": images.levels,
        "crc32": zlib.crc32(images.pixels.contiguous().numpy().tobytes()),
    }


@dataclass
class _Job:
    folder: RunFolder
    trainer: Trainer
    images: Images
    train: Images
    held_out: Images
    machine: Machine
    baseline: float = math.nan

    @property
    def ranks(self) -> Ranks:
        return self.trainer.ranks

    def run(self) -> Path:
        trainer = self.trainer
        history = trainer.progress.history
        if not self.ranks.writes:
            for steps in trainer.epochs():
                for _ in steps:
                    pass
            trainer.log_prob(IMPORTANCE_SAMPLES)
            return self.folder.final
        self._introduce()
        board = tensorboard.Board(self.folder.folder, history)
        with self._progress_bar() as bar:
            for row in history:
                bar.write(_line(row))
            for steps in trainer.epochs():
                for _ in steps:
                    bar.update()
                self._save()
                board.add(history[-1])
                bar.write(_line(history[-1]))
        board.close()
        self._conclude()
        return self.folder.final

    def _introduce(self) -> None:
        config, trainer, images = self.trainer.config, self.trainer, self.images
        channels, height, width = images.shape
        x = self.train.dequantise(seeded(config.seed, DEQUANTISE))
        pca = ProbabilisticPCA.fit(x, config.latent, floor=images.rounding_error)
        exact = float(pca.log_prob(trainer.x_held_out.cpu()).mean())
        entropy = images.nats_per_density
        self.baseline = exact - entropy
        print(
            f"data      {images.name}: {len(images)} images of {channels}x{height}x{width},",
            end=" ",
        )
        print(f"{images.levels} levels; {len(self.train)} to train, {len(self.held_out)} held out")
        print(f"model     {config.architecture().describe()},", end=" ")
        print(
            f"{config.variance} variance, {count_parameters(trainer.model):,} parameters", end=" "
        )
        print(f"on {trainer.device}", end="")
        print(f", {self.ranks.size} ranks" if self.ranks.size > 1 else "")
        if config.objective != "elbo":
            print(f"objective {config.objective}", end=" ")
            print(", ".join(f"{k} {v}" for k, v in config.objective_options.items()))
        print(
            f"baseline  probabilistic PCA, {config.latent} latent dimensions, learned sigma",
            end=" ",
        )
        print(f"{math.sqrt(pca.noise_variance):.4f}: exact log p(x) = {self.baseline:.1f}")
        print(
            f"units     nats per held-out image: a density on [0, 1] minus {entropy:.1f}", end=" "
        )
        print(f"= {math.prod(images.shape)} ln {images.levels}")
        print(f"run       {self.folder.folder}, renamed to {self.folder.final.name} when complete")
        if self.machine.tensorboard and not tensorboard.available():
            print(
                "note      --tensorboard: not installed, no event files (pip install tensorboard)"
            )
        print("\nepoch  held-out:  ELBO      rate  distortion   sigma   training ELBO", flush=True)

    def _progress_bar(self) -> Any:
        from tqdm import tqdm  # type: ignore[import-untyped]

        return tqdm(
            total=self.trainer.total_steps,
            initial=self.trainer.progress.step,
            unit="step",
            desc="training",
            disable=not self.machine.progress,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        )

    def _save(self) -> None:
        history = self.trainer.progress.history
        tensors, state = self.trainer.state()
        if self.trainer.progress.epoch == 1:  # what the report compares the end with
            model = {k: v for k, v in tensors.items() if k.startswith("model.")}
            self.folder.save_tensors(EARLY, model, {"epoch": 1})
        self.folder.save_tensors(CHECKPOINT, tensors, state)

        def write_metrics(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(history[0]))
                writer.writeheader()
                writer.writerows(history)

        self.folder.write(METRICS, write_metrics)

    def _conclude(self) -> None:
        trainer, folder, config = self.trainer, self.folder, self.trainer.config
        history = trainer.progress.history
        x = trainer.x_held_out[:PICTURES]
        key = trainer.key.fold_in(NOISE_PICTURES)
        restored = trainer.model.eval().reconstruct(x)
        drawn = sample(trainer.model, SAMPLES, config.latent, key)
        figures = {
            "reconstructions.png": plots.reconstructions_figure(x, restored),
            "samples.png": plots.samples_figure(drawn, config.architecture().prior_name),
            "curves.png": plots.curves_figure(history, self.baseline),
        }
        for name, figure in figures.items():
            folder.write(name, functools.partial(plots.save, figure))
        bound = trainer.log_prob(IMPORTANCE_SAMPLES)
        summary = {
            **history[-1],
            "log_prob_bound": bound,
            "importance_samples": IMPORTANCE_SAMPLES,
            "baseline_log_prob": self.baseline,
        }
        folder.write_json("summary.json", summary)
        folder.finish()
        elbo = history[-1]["elbo"]
        print(
            f"\nheld-out ELBO {elbo:.1f} nats per image, {abs(elbo - self.baseline):.1f}"
            f" {'above' if elbo > self.baseline else 'below'} probabilistic PCA"
            f" ({self.baseline:.1f}); log p(x) >= {bound:.1f} with {IMPORTANCE_SAMPLES} importance"
            f" samples\nlook at {folder.final}: reconstructions.png, samples.png, curves.png,"
            " metrics.csv"
        )


def _line(row: dict[str, float]) -> str:
    return (
        f"{row['epoch']:5d} {row['elbo']:15.1f} {row['rate']:9.1f} {row['distortion']:11.1f} "
        f"{row['sigma']:7.4f} {row['train_elbo']:15.1f}"
    )
