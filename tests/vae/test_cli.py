"""``fused-vae`` from end to end, and every way to call it wrongly."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fused_vae import job
from fused_vae.cli import main
from fused_vae.run_folder import read_checkpoint

pytestmark = pytest.mark.xdist_group("cli")  # what its fixtures make is made once

TINY = ["digits", "--network", "mlp", "--latent", "2", "--epochs", "1", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", *TINY, "--run", str(folder)]) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_folder_holds_everything(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names - {"tensorboard"} == {
        "checkpoint.safetensors",
        "config.json",
        "curves.png",
        "early.safetensors",
        "metrics.csv",
        "reconstructions.png",
        "samples.png",
        "summary.json",
    }
    for name in ("curves.png", "reconstructions.png", "samples.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # something is drawn
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    assert float(rows[0]["elbo"]) == pytest.approx(
        -float(rows[0]["rate"]) - float(rows[0]["distortion"])
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["log_prob_bound"] > summary["elbo"]


def test_the_checkpoint_gives_the_trained_model_back(run: Path) -> None:
    model, config, images = job.load_run(run)
    assert (config.latent, config.network, images.name) == (2, "mlp", "digits")
    tensors, _ = read_checkpoint(run)
    assert (model.state_dict()["decoder.0.weight"] == tensors["model.decoder.0.weight"]).all()


def test_baseline_and_parts_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--run", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "probabilistic PCA, 2 latent dimensions" in out
    for word in ("ELBO", "rate", "distortion", "nats"):
        assert word in out
    assert str(tmp_path / "a") in out


def test_the_same_command_gives_the_same_checkpoint(run: Path, tmp_path: Path) -> None:
    arguments = ["--data", *TINY, "--run", str(tmp_path / "again")]
    assert main(["train", *arguments]) == 0
    again, _ = read_checkpoint(tmp_path / "again")
    first, _ = read_checkpoint(run)
    assert first.keys() == again.keys()
    assert all((first[k] == again[k]).all() for k in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["train", "--latent", "0"], "--latent must be at least 1"),
        (["train", "--network", "x"], "--network must be one of"),
        (["train", "--device", "tpu"], "--device must be cpu or cuda"),
        (["train", "--threads", "0"], "--threads must be at least 1"),
        (["train", "/nowhere/at/all"], "/nowhere/at/all: no such file or folder"),
        (["train", "x" * 5000], "File name too long"),
        (["train", "digits", "--run", "/dev/null/run"], "cannot be written"),
        (["train", "digits", "--run", "/proc/run"], "cannot be written"),
        (["train", "digits", "--run", "/"], "needs a name of its own"),
        (["train", "digits", "--run", "/dev/null"], "is a file"),
        (["train", "digits", "--overwrite", "--resume"], "exclude each other"),
        (["train", "--resume", "--run", "/nowhere/run"], "there is no run to resume"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fused-vae: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_bad_data_leaves_an_existing_run_intact(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    (tmp_path / "fake.png").write_text("text")
    for arguments in ([str(tmp_path), "--overwrite"], ["digits"], ["digits", "--latent", "-1"]):
        assert main(["train", *arguments, "--run", str(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert files(run) == before
    assert list(run.parent.iterdir()) == [run]


def test_training_that_fails_leaves_an_existing_run_intact(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    arguments = [*TINY, "--lr", "1e30", "--run", str(run), "--overwrite"]
    assert main(["train", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fused-vae: step ")
    assert "first in layer" in error
    assert files(run) == before


def test_resume_refuses_other_options_and_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((40, 8, 8)))
    arguments = [str(tmp_path / "a.npy"), *TINY[1:], "--run", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 0
    assert main(["train", *arguments, "--resume"]) == 2
    assert "this run is complete" in capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "run.partial")
    assert main(["train", *arguments, "--resume", "--latent", "3"]) == 2
    assert "--latent 3 (the run has 2)" in capsys.readouterr().err
    np.save(tmp_path / "a.npy", np.random.default_rng(1).random((40, 8, 8)))
    assert main(["train", *arguments, "--resume"]) == 2
    assert "are not those that the run was started with" in capsys.readouterr().err
    assert (tmp_path / "run.partial" / "summary.json").exists()


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    assert "--resume" in capsys.readouterr().out


def hear_interrupts() -> None:
    """A shell starts background jobs deaf to SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fused_vae", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=hear_interrupts,
    )


LONGER = [*TINY, "--epochs", "12"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *LONGER, "--run", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_ends_as_if_it_never_was(
    number: signal.Signals, never_stopped: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    process = start([*LONGER, "--run", str(stopped)])
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped.partial" / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert (
            error.splitlines()[-1] == "fused-vae: stopped; --resume continues after the last epoch"
        )
    assert not stopped.exists()
    assert main(["train", *LONGER, "--run", str(stopped), "--resume"]) == 0
    expected, result = read_checkpoint(never_stopped)[0], read_checkpoint(stopped)[0]
    assert all((expected[k] == result[k]).all() for k in expected)
