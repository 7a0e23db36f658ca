"""What test_distributed.py runs under torchrun: ``ranks.py OUT`` trains a little with every
objective and meets a bad image; rank 0 writes what it saw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_vae import data, distributed
from fused_vae.config import TrainConfig
from fused_vae.distributed import Ranks
from fused_vae.errors import TrainingError
from fused_vae.objective_options import OBJECTIVES
from fused_vae.train import Trainer

NEEDS: dict[str, dict[str, Any]] = {
    "geco": {"objective_options": {"target": 150.0}},
    "beta-nll": {"variance": "predicted"},
    "capacity": {"objective_options": {"capacity": 4.0, "capacity_steps": 16}},
    "infovae": {"objective_options": {"alpha": 0.5}},
    "balanced": {"network": "hierarchy", "warm_up": "linear", "warm_up_steps": 32},
}
RUNS: dict[str, dict[str, Any]] = {
    **{objective: {"objective": objective, **NEEDS.get(objective, {})} for objective in OBJECTIVES},
    "iaf, vamp": {"flow": "iaf", "prior": "vamp"},
    "planar, real-nvp": {"flow": "planar", "prior": "real-nvp"},
}


def trainers(ranks: Ranks) -> Iterator[tuple[str, Trainer]]:
    """One per objective, and with flows and priors; the batch size divides into no number of
    ranks.
    """
    train, held_out = data.load("digits").split(0.1, seed=0)
    images = train.select(torch.arange(5 * 101)), held_out
    common = {"data": "digits", "network": "mlp", "latent": 3, "epochs": 1, "batch_size": 101}
    for name, options in RUNS.items():
        config = TrainConfig(**{**common, **options})
        yield name, Trainer(config.resolved(images[0]), *images, "cpu", ranks)


def histories(ranks: Ranks) -> dict[str, dict[str, float]]:
    """The first epoch of each, and the length of its parameters."""
    found = {}
    for name, trainer in trainers(ranks):
        for steps in trainer.epochs():
            for _ in steps:
                pass
        row = trainer.progress.history[-1]
        norm = torch.nn.utils.get_total_norm(trainer.model.parameters())
        found[name] = {**row, "norm": float(norm), "bound": trainer.log_prob(3), "seconds": 0}
    return found


def bad_image(ranks: Ranks) -> str:
    """What is said of a batch whose last image is not finite."""
    _, trainer = next(trainers(ranks))
    x, numbers = next(trainer._batches(0))
    if ranks.rank == ranks.size - 1:
        x[-1] = torch.nan
    before = [p.clone() for p in trainer.model.parameters()]
    try:
        trainer.step(x, numbers)
    except TrainingError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
        return str(error)
    return "nothing was said"


def main(out: Path) -> None:
    """Every rank runs this."""
    torch.set_num_threads(1)
    with distributed.joined(torch.device("cpu")) as ranks:
        found = {"histories": histories(ranks), "bad": ranks.gather_objects(bad_image(ranks))}
        if ranks.writes:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
