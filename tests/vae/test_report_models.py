"""The report of models with flows, priors and layers says what is true of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_vae import FlexibleVAE, HierarchicalVAE, job, latents, study
from fused_vae.cli import main
from fused_vae.run_folder import read_checkpoint

pytestmark = pytest.mark.xdist_group("report_models")  # what its fixtures make is made once

TRAIN = ["digits", "--threads", "1", "--quiet", "--latent", "6", "--epochs", "6", "--lr", "4e-3"]
MODELS = {
    "flow": ["--network", "mlp", "--flow", "iaf", "--prior", "vamp"],
    "layers": ["--network", "hierarchy"],
}


@pytest.fixture(scope="module", autouse=True)
def few_candidates() -> Iterator[None]:
    """Each costs a way back through the flow for every code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "FLOW_CANDIDATES", 300)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for name, options in MODELS.items():
        arguments = [*TRAIN, *options, "--batch-size", "50", "--run", str(folder / name)]
        assert main(["train", *arguments]) == 0
        assert main(["report", str(folder / name)]) == 0
    return {name: folder / name for name in MODELS}


def read(run: Path, name: str) -> dict[str, Any]:
    values = json.loads((run / name).read_text())
    assert isinstance(values, dict)
    return values


def captions(run: Path) -> str:
    page = (run / "report.html").read_text()
    found = re.findall(r"<figcaption><p>(.+?)</p><p><b>(.+?)</b></p></figcaption>", page)
    assert len(found) == 11
    return " ".join(text for caption in found for text in caption)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_loaded_as_it_was_trained(name: str, runs: dict[str, Path]) -> None:
    model, config, _ = job.load_run(runs[name])
    tensors = read_checkpoint(runs[name])[0]
    assert isinstance(model, FlexibleVAE if name == "flow" else HierarchicalVAE)
    for key, value in model.state_dict().items():
        assert value.equal(tensors[f"model.{key}"]), key
    assert (config.flow, config.prior, config.layers) == (
        ("iaf", "vamp", 0) if name == "flow" else ("none", "standard", 3)
    )


@pytest.mark.parametrize("name", MODELS)
def test_numbers_agree_with_each_other(name: str, runs: dict[str, Path]) -> None:
    values, summary = read(runs[name], "report.json"), read(runs[name], "summary.json")
    assert values["rate"] == pytest.approx(summary["rate"], rel=0.05)
    assert summary["log_prob_bound"] > summary["elbo"]
    assert values["candidates"] == (300 if name == "flow" else 1797)
    assert 1 < values["information_lower"] < values["ln_candidates"]
    assert values["information_lower"] <= values["information_upper"] <= values["rate"]
    assert values["retrieval"] > 10 / values["candidates"]
    assert values["retrieval_of_2"] > 0.9
    assert values["overlap_between_late"] < values["overlap_within_late"] < 1
    assert values["overlap_between_late"] < values["overlap_between_early"]


@pytest.mark.parametrize("name", MODELS)
def test_sentences_do_not_speak_of_a_prior_or_rates_that_are_not_there(
    name: str, runs: dict[str, Path]
) -> None:
    text = captions(runs[name])
    assert "N(0, I)" not in text
    assert "nan" not in text
    assert "estimated from one sample of each" in text
    assert "from the least to the greatest value" in text
    assert ("no share per dimension" in text) == (name == "flow")
    assert ("share of the rate" in text) == (name == "layers")


def test_the_page_says_what_was_trained_and_the_rate_of_each_layer(runs: dict[str, Path]) -> None:
    flow, layers = ((runs[name] / "report.html").read_text() for name in MODELS)
    assert "mlp networks, 6 latent dimensions, iaf flow, vamp prior, learned variance" in flow
    assert "hierarchy, 6 latent dimensions in layers of 2 + 2 + 2, learned variance" in layers
    assert "rate of layer" not in flow
    summary = read(runs["layers"], "summary.json")
    rows = dict(re.findall(r"<td>(rate of layer \d)</td><td>([\d.]+)</td>", layers))
    assert rows == {f"rate of layer {i}": f"{summary[f'rate_{i}']:.1f}" for i in (1, 2, 3)}
    material = study.prepare(runs["layers"])
    x = material.x[: material.queries]
    shares = latents.rate_per_dimension(material.model, x, material.key)
    assert shares is not None
    for layer in range(3):
        expected = summary[f"rate_{layer + 1}"]
        assert float(shares[2 * layer : 2 * layer + 2].sum()) == pytest.approx(expected, rel=0.05)


def test_resuming_with_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job._Job, "run", lambda self: self.folder.final)  # leave it unfinished
    run = ["--run", str(tmp_path / "run")]
    assert main(["train", *TRAIN, *MODELS["layers"], *run]) == 0
    for options, message in (
        (["--network", "mlp"], "--network mlp (the run has hierarchy)"),
        (["--layers", "2"], "--layers 2 (the run has 3)"),
    ):
        assert main(["train", *run, "--resume", *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", *run, "--resume", *MODELS["layers"]]) == 0


def test_a_sweep_trains_the_asked_model(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    options = ["digits", "--network", "mlp", "--latent", "2", "--epochs", "1", "--quiet"]
    options += ["--threads", "1", "--batch-size", "400"]
    flow = ["--flow", "planar", "--beta", "1", "100", "--run", str(folder)]
    assert main(["sweep", *options, *flow]) == 0
    assert main(["sweep", *options, *flow]) == 0  # finds its runs
    assert job.load_run(folder / "beta-100")[1].flow == "planar"
    assert "ELBO" in (folder / "sweep.html").read_text()
