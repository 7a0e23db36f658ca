"""The rate-distortion curve, and the collapse at its end."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from fused_vae.cli import main
from fused_vae.sweep import panels

pytestmark = pytest.mark.xdist_group("sweep")  # what its fixtures make is made once

OPTIONS = [
    "digits",
    "--network",
    "mlp",
    "--threads",
    "1",
    "--quiet",
    "--latent",
    "6",
    "--batch-size",
    "50",
    "--lr",
    "4e-3",
    "--epochs",
    "12",
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    assert main(["sweep", *OPTIONS, "--beta", "300", "1", "0.2", "--run", str(folder)]) == 0
    return folder


def table(folder: Path) -> list[dict[str, float]]:
    with open(folder / "sweep.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_a_dearer_code_is_shorter_and_says_less(sweep: Path) -> None:
    rows = table(sweep)
    assert [row["beta"] for row in rows] == [0.2, 1, 300]
    rates = [row["rate"] for row in rows]
    assert rates[0] > rates[1] > 10 * rates[2]
    assert rows[0]["distortion"] < rows[1]["distortion"] < rows[2]["distortion"]
    assert rows[1]["elbo"] == max(row["elbo"] for row in rows)  # the price that ELBO itself asks
    assert rows[0]["retrieval"] > 0.9
    assert rows[2]["retrieval"] < 0.01


def test_the_page_says_where_retrieval_collapses(sweep: Path) -> None:
    page = (sweep / "sweep.html").read_text()
    assert page.count("<figure>") == 2
    assert "At beta = 300 the rate is 0.0 nats" in page
    assert "is at beta = 1:" in page
    captions = re.findall(r"<figcaption><p>(.+?)</p><p><b>(.+?)</b></p></figcaption>", page)
    for sentence in (text for caption in captions for text in caption):
        assert len(re.findall(r"[.!?](?:\s|$)", sentence)) == 1


def test_a_sweep_of_models_that_learned_nothing_says_so() -> None:
    row = {
        "elbo": -187.0,
        "rate": 0.1,
        "distortion": 186.9,
        "baseline_log_prob": -161.0,
        "candidates": 100,
        "retrieval": 0.0,
        "match": 0.01,
    }
    rate_distortion, collapse = panels([{**row, "beta": beta} for beta in (1.0, 10.0)])
    assert "26.0 nats below the best linear model" in rate_distortion.meaning
    assert "At beta = 1 the rate is 0.1 nats" in collapse.meaning
    labels = [text.get_text() for text in rate_distortion.figure.axes[0].texts]
    assert labels == ["beta 1, 10"]  # one label where points coincide


def test_runs_that_exist_are_kept(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in sweep.rglob("checkpoint.safetensors")}
    assert len(before) == 3
    arguments = ["sweep", *OPTIONS, "--beta", "1", "300", "--run", str(sweep)]
    assert main([*arguments, "--latent", "7"]) == 2
    assert "was trained with other options: --latent 7 (the run has 6)" in capsys.readouterr().err
    assert main(arguments) == 0
    assert [row["beta"] for row in table(sweep)] == [1, 300]
    assert {p: p.stat().st_mtime_ns for p in sweep.rglob("checkpoint.safetensors")} == before


@pytest.mark.parametrize("betas", [["1"], ["1", "1"], ["1", "-1"], ["1", "nan"]])
def test_bad_betas_are_refused(betas: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "digits", "--beta", *betas, "--run", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "--beta" in error
    assert error.count("\n") == 1
