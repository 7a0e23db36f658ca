"""The report says what is true of the run, and stands on its own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from fused_vae import plots, study
from fused_vae.cli import main

pytestmark = pytest.mark.xdist_group("report")  # what its fixtures make is made once

TRAIN = [
    "digits",
    "--network",
    "mlp",
    "--threads",
    "1",
    "--quiet",
    "--batch-size",
    "50",
    "--lr",
    "4e-3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned something."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    arguments = [*TRAIN, "--latent", "6", "--epochs", "20", "--run", str(folder)]
    assert main(["train", *arguments]) == 0
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose KL was too expensive for its code to say anything."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    arguments = [*TRAIN, "--latent", "6", "--epochs", "4", "--beta", "1000", "--run", str(folder)]
    assert main(["train", *arguments]) == 0
    assert main(["report", str(folder)]) == 0
    return folder


def numbers(run: Path) -> dict[str, float]:
    values = json.loads((run / "report.json").read_text())
    assert isinstance(values, dict)
    return values


def test_page_is_self_contained(run: Path) -> None:
    page = (run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == page.count("<figure>") == 11
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)
    assert "<script" not in page


def test_every_figure_says_what_is_shown_and_what_it_means(run: Path) -> None:
    page = (run / "report.html").read_text()
    captions = re.findall(r"<figcaption><p>(.+?)</p><p><b>(.+?)</b></p></figcaption>", page)
    assert len(captions) == 11
    for sentence in (text for caption in captions for text in caption):
        assert len(sentence) > 30
        assert len(re.findall(r"[.!?](?:\s|$)", sentence)) == 1, sentence
    assert "nan" not in " ".join(meaning for _, meaning in captions)


def test_the_cap_of_the_lower_bound_is_stated_whatever_it_is(run: Path, collapsed: Path) -> None:
    for folder in (run, collapsed):
        assert "cannot exceed ln 1797 = 7.5 nats" in (folder / "report.html").read_text()


def test_labels_of_picture_rows_lie_inside_the_figure() -> None:
    images = torch.rand(3, 1, 8, 5)
    figure = plots.rows_figure([("z ~ q(z | first)", images), ("z10: 12.3 nats", images[:2])])
    figure.canvas.draw()
    frame = figure.bbox
    for axes in figure.axes:
        (text,) = axes.texts
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= axes.bbox.x0
        assert frame.y0 <= axes.bbox.y0 < axes.bbox.y1 <= frame.y1


def test_retrieval_information_and_rate_agree_where_codes_inform(run: Path) -> None:
    values = numbers(run)
    assert values["rate"] > values["ln_candidates"]
    assert values["information_lower"] > values["ln_candidates"] - 1
    assert values["information_lower"] <= values["information_upper"] <= values["rate"]
    assert values["retrieval"] > 0.7
    assert values["retrieval_of_2"] > 0.99
    assert values["match_of_2"] > 0.99
    assert values["distortion_excess_other"] > values["distortion_excess_same_class"] > 10
    assert values["overlap_between_late"] < values["overlap_within_late"]
    assert values["overlap_between_late"] < values["overlap_between_early"]
    assert values["residual_rms"] == pytest.approx(1, abs=0.2)


def test_retrieval_is_chance_and_the_page_says_so_where_the_posterior_has_collapsed(
    collapsed: Path,
) -> None:
    values = numbers(collapsed)
    assert values["rate"] < 0.1
    assert values["information_upper"] < 0.1
    assert values["retrieval"] < 0.01
    assert values["retrieval_of_2"] == pytest.approx(0.5, abs=0.1)
    assert values["active_units"] == 0
    page = (collapsed / "report.html").read_text()
    assert "the posterior has collapsed" in page
    assert "the force that keeps" not in page
    assert "must be confused" in page
    assert "0 of 6 dimensions are in use" in page
    assert "Training weighted the rate with beta" in page


def test_summary_and_report_measure_the_same_rate(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert numbers(run)["rate"] == pytest.approx(summary["rate"], rel=1e-4)
    kl = study.measure(run, study.prepare(run)).kl_per_dimension
    assert kl is not None
    assert float(kl.sum()) == pytest.approx(summary["rate"], rel=1e-4)


def test_queries_are_held_out_pictures(run: Path) -> None:
    material = study.prepare(run)
    assert material.queries == 180
    assert len(material.x) == 1797
    levels = (material.x[:180] * 17).floor()
    assert torch.equal(levels, material.held_out.pixels.float())
    assert math.isfinite(float(material.code.sum()))


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "is not a complete run" in error
    assert error.count("\n") == 1
