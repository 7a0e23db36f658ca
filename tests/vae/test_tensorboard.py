"""TensorBoard shows metrics.csv, and is not needed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from fused_vae import tensorboard
from fused_vae.cli import main

RUN = ["digits", "--network", "mlp", "--latent", "2", "--threads", "1", "--quiet"]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_rows_of_the_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    warm_up = ["--beta", "2", "--warm-up", "linear", "--warm-up-steps", "64"]
    assert main(["train", *RUN, *warm_up, "--epochs", "2", "--run", str(run)]) == 0
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found = curves(run)
    for tag, column in (
        ("held-out/elbo", "elbo"),
        ("held-out/sigma", "sigma"),
        ("train/elbo", "train_elbo"),
        ("train/beta", "beta"),
    ):
        expected = [(int(row["step"]), pytest.approx(float(row[column]))) for row in rows]
        assert found[tag] == expected
    assert [value for _, value in found["train/beta"]] == [15 / 32, 31 / 32]


def test_a_resumed_run_has_each_point_once(tmp_path: Path) -> None:
    history = [{"epoch": 1.0, "step": 16, "elbo": -3.0}, {"epoch": 2.0, "step": 32, "elbo": -2.0}]
    board = tensorboard.Board(tmp_path, [])
    for row in history:
        board.add(row)
    board.close()
    board = tensorboard.Board(tmp_path, history[:1])  # killed between event file and checkpoint
    board.add(history[1])
    board.close()
    assert curves(tmp_path) == {"held-out/elbo": [(16, -3.0), (32, -2.0)]}


def test_without_tensorboard_nothing_is_said_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "available", lambda: False)
    for name, asked in (("a", []), ("b", ["--tensorboard"])):
        assert main(["train", *RUN, *asked, "--epochs", "1", "--run", str(tmp_path / name)]) == 0
        out, err = capsys.readouterr()
        assert ("not installed" in out) == bool(asked)
        assert "tensorboard" not in err.lower()
        assert not (tmp_path / name / "tensorboard").exists()
