"""``fused-vae sweep``: the same VAE at several prices of the code, and where it pays no more."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import job, plots, study
from .config import TrainConfig
from .errors import UserError
from .machine import Machine
from .panels import Panel
from .report import render_document
from .run_folder import CONFIG, RunFolder, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]


def run(
    folder: str | Path,
    config: TrainConfig,
    betas: Sequence[float],
    machine: Machine,
    *,
    overwrite: bool,
) -> Path:
    """Train one run per beta into ``FOLDER/beta-...``; write sweep.csv and sweep.html.

    Raises:
        UserError: as `job.start`; too few or repeated betas.
    """
    if len(set(betas)) < 2 or len(set(betas)) < len(betas):
        raise UserError(f"--beta of a sweep needs two or more different values, got {list(betas)}")
    configs = [replace(config, beta=beta) for beta in sorted(betas)]
    root = Path(folder)
    rows = []
    for each in configs:
        path = root / f"beta-{each.beta:g}"
        _train(path, each, machine, overwrite)
        rows.append(_row(each.beta, path))
    out = RunFolder(root)
    out.folder = out.final

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    page = render_document(f"The price of a code: {root.name}", INTRODUCTION, panels(rows))
    out.write("sweep.csv", write_csv)
    out.write("sweep.html", lambda path: path.write_text(page, encoding="utf-8"))
    return out.final / "sweep.html"


def _train(path: Path, config: TrainConfig, machine: Machine, overwrite: bool) -> None:
    """Unless it was trained before; an unfinished run is continued."""
    torch.compiler.reset()  # a graph per run, of which torch keeps a few only
    run = RunFolder(path)
    found = [folder for folder in (run.final, run.folder) if (folder / CONFIG).is_file()]
    if overwrite or not found:
        job.start(path, config, machine, overwrite=overwrite)
        return
    stored = TrainConfig.from_dict(read_json(found[0] / CONFIG)["train"])
    asked = replace(  # what was left open has been chosen by the run
        config,
        data=config.data if config.data == stored.data else str(Path(config.data).resolve()),
        epochs=config.epochs or stored.epochs,
        batch_size=config.batch_size or stored.batch_size,
        warm_up_steps=config.warm_up_steps or stored.warm_up_steps,
    )
    if changes := stored.differences(asked):
        raise UserError(f"{path}: was trained with other options: {'; '.join(changes)}")
    if found[0] == run.folder:
        job.resume(path, {}, machine)


def _row(beta: float, path: Path) -> Row:
    summary = read_json(path / "summary.json")
    numbers = study.measure(path, study.prepare(path)).numbers()
    return {
        "beta": beta,
        **{
            key: summary[key]
            for key in ("elbo", "rate", "distortion", "sigma", "baseline_log_prob")
        },
        **{
            key: numbers[key]
            for key in ("candidates", "information_lower", "retrieval", "match", "active_units")
        },
    }


INTRODUCTION = (
    "Beta is the price of one nat of code in nats of distortion: training minimizes distortion + "
    "beta * rate. Beta = 1 is the ELBO. Each point below is one model, trained in the same way at "
    "another price."
)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """The rate-distortion curve, and where retrieval collapses."""
    return [_rate_distortion(rows), _collapse(rows)]


def _rate_distortion(rows: Sequence[Row]) -> Panel:
    figure, axes = _axes()
    rates, distortions = [r["rate"] for r in rows], [r["distortion"] for r in rows]
    axes.plot(rates, distortions, marker="o", color="C0")
    span = (max(rates) - min(rates)) / 10 or 1.0
    height = (max(distortions) - min(distortions)) / 10 or 1.0
    labels: dict[tuple[float, float], str] = {}  # points that lie together share one label
    for row in rows:
        x, y, beta = row["rate"], row["distortion"], row["beta"]
        reach = min(span, height / max(beta, 1e-9))
        across, down = [x - reach, x + reach], [y + beta * reach, y - beta * reach]
        axes.plot(across, down, color="C1", linewidth=3, alpha=0.6)
        close = [p for p in labels if abs(p[0] - x) < span / 2 and abs(p[1] - y) < height / 2]
        if close:
            labels[close[0]] += f", {beta:g}"
        else:
            labels[x, y] = f"beta {beta:g}"
    for point, label in labels.items():
        axes.annotate(label, point, xytext=(8, 8), textcoords="offset points")
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel="rate, nats per picture", ylabel="distortion, nats per picture")
    best = max(rows, key=lambda row: row["elbo"])
    short = best["baseline_log_prob"] - best["elbo"]
    return Panel(
        "Rate against distortion",
        "Held-out rate and distortion of each model; where training has converged, the curve has"
        " the slope -beta of the short orange lines (arXiv:1711.00464): one more nat of code saves"
        " beta nats of distortion.",
        f"The highest ELBO, {best['elbo']:.1f}, is at beta = {best['beta']:g}"
        + (
            f", and still {short:.1f} nats below the best linear model: these models were trained"
            " too little to read much into the curve."
            if short > 0
            else ": a lower beta buys code that saves less distortion than it costs, a higher one"
            " leaves worthwhile code unbought."
        ),
        figure,
    )


def _collapse(rows: Sequence[Row]) -> Panel:
    figure, axes = _axes()
    betas = [row["beta"] for row in rows]
    count, cap = int(rows[0]["candidates"]), math.log(rows[0]["candidates"])
    axes.plot(betas, [r["retrieval"] for r in rows], marker="o", label="densest posterior")
    axes.plot(betas, [r["match"] for r in rows], marker="s", label="nearest picture")
    axes.set(xlabel="beta", ylabel="own picture wins", ylim=(-0.03, 1.05))
    axes.set_xscale("symlog", linthresh=min((b for b in betas if b > 0), default=1.0))
    other = axes.twinx()
    other.plot(betas, [r["rate"] for r in rows], color="C2", linestyle="--", label="rate (right)")
    other.axhline(cap, color="0.5", linestyle=":", label=f"ln N = {cap:.1f} (right)")
    other.set_ylabel("nats")
    lost = next((index for index, row in enumerate(rows) if row["retrieval"] < 0.5), None)
    if lost is None:
        meaning = (
            f"Up to beta = {betas[-1]:g} a sample still finds its own posterior most of the time:"
            " the price is not high enough for a collapse."
        )
    else:
        row = rows[lost]
        if lost > 0:
            axes.axvspan(betas[lost - 1], betas[lost], color="C3", alpha=0.12, label="collapse")
        meaning = (
            f"At beta = {row['beta']:g} the rate is {row['rate']:.1f} nats (ln N = {cap:.1f}) and"
            f" the right posterior wins in {row['retrieval']:.0%} of the draws: from here on Bob's"
            " samples do decode to Alice, and whoever worries about it is right."
        )
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=5, fontsize=9)
    return Panel(
        "Where Bob becomes Alice",
        "How often a posterior sample finds its own posterior, and its decoding its own picture, "
        f"among {count} candidates, against the price of the code.",
        meaning,
        figure,
    )


def _axes() -> tuple[Figure, Axes]:
    figure = plots.new_figure(8, 4.5)
    return figure, figure.subplots()
