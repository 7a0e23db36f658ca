"""Several ranks train the model that one trains, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_vae import data
from fused_vae.cli import main
from fused_vae.config import TrainConfig
from fused_vae.distributed import Ranks
from fused_vae.errors import UserError
from fused_vae.run_folder import read_checkpoint
from fused_vae.train import Trainer

from . import ranks

ROOT = Path(__file__).parents[2]


def launch(count: int, *arguments: str) -> subprocess.Popen[str]:
    """What ``torchrun`` does."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={count}", *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def said(error: str) -> list[str]:
    """The lines of this program among torchrun's."""
    return [line for line in error.splitlines() if line.startswith("fused-vae: ")]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_image_has_its_rank(size: int) -> None:
    parts = [Ranks(rank, size).part(10) for rank in range(size)]
    assert [i for part in parts for i in range(10)[part]] == list(range(10))
    assert sum(Ranks(rank, size).share(10) for rank in range(size)) == pytest.approx(1)


def test_two_ranks_train_as_one_with_every_objective_and_model(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = launch(2, "-m", "tests.vae.ranks", str(out))
    alone = ranks.histories(Ranks())
    report = ranks.bad_image(Ranks())
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    together = json.loads(out.read_text())
    for name, row in alone.items():
        found = together["histories"][name]
        assert found == pytest.approx(row, rel=2e-5, abs=1e-4, nan_ok=True), name
    assert together["bad"] == [report, report]
    assert f"for 1 of 101 images of the batch (numbers {expected_number()} of the data)" in report
    assert "first in what layer encoder.0 was given" in report


def expected_number() -> int:
    """Where in the data set the last image of the first batch is."""
    _, trainer = next(ranks.trainers(Ranks()))
    x, numbers = next(trainer._batches(0))
    number = int(numbers[-1])
    levels = (x[-1] * 17).floor()
    assert torch.equal(levels, data.load("digits").pixels[number].float())
    return number


RUN = ["digits", "--network", "mlp", "--latent", "2", "--batch-size", "101", "--quiet"]


def test_a_rank_that_dies_ends_all_and_one_continues(tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = launch(2, "-m", "fused_vae", "train", *RUN, "--epochs", "12", "--folder", str(run))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run.partial" / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child(process.pid, rank=1), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(said(error)) == 1  # of what rank 0 meets first: a closed connection, or SIGTERM
    assert "--resume continues" in said(error)[0]
    options = [*RUN, "--epochs", "12", "--threads", "1"]
    assert main(["train", *options, "--run", str(run), "--resume"]) == 0
    assert main(["train", *options, "--run", str(whole)]) == 0
    found, expected = read_checkpoint(run)[0], read_checkpoint(whole)[0]
    for name, tensor in expected.items():
        if name.startswith("model."):
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def child(launcher: int, rank: int) -> int:
    """The process of one rank."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(pid)
    raise AssertionError("no such rank")


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    process = launch(2, "-m", "fused_vae", "train", *RUN, "--objective", "x")
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(said(error)) == 1
    assert "--objective must be one of elbo, " in said(error)[0]


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    images = data.load("digits").split(0.1, seed=0)
    config = TrainConfig(data="digits", batch_size=2).resolved(images[0])
    with pytest.raises(UserError, match="--batch-size 2 is less than the 3 ranks"):
        Trainer(config, *images, "cpu", Ranks(0, 3))


def test_only_training_is_distributed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fused_vae import distributed

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "first_to_fail", lambda: True)
    assert main(["report", str(tmp_path)]) == 2
    assert "torchrun starts fused-vae train only" in capsys.readouterr().err
