"""The pictures of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot's global state or a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _set_by_hand(width: float, height: float) -> Figure:
    """A figure whose axes stay where they are put."""
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    return figure


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """[N, C, H, W] in [0, 1] -> a picture [H', W', 3] of rows of `columns`, white between."""
    images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet.permute(1, 2, 0)


def save(figure: Figure, path: Path) -> None:
    """As PNG, whatever the name ends in."""
    figure.savefig(path, format="png")


def reconstructions_figure(originals: Tensor, restored: Tensor, columns: int = 8) -> Figure:
    """Rows of originals, each with its reconstructions right below."""
    rows: list[tuple[str, Tensor]] = []
    for original, other in zip(originals.split(columns), restored.split(columns), strict=True):
        rows += [("original", original), ("through\nthe VAE", other)]
    return rows_figure(rows, "Held-out images and their reconstructions")


def rows_figure(rows: Sequence[tuple[str, Tensor]], title: str = "") -> Figure:
    """Rows of pictures, a label before each; shorter rows end in white."""
    columns = max(len(images) for _, images in rows)
    height, width = rows[0][1].shape[2:]
    labels = max(len(line) for label, _ in rows for line in label.split("\n"))
    left, top, across = 0.1 + 0.075 * labels, 0.4 if title else 0.05, 8.9  # inches
    row = (across - left) / columns * height / width
    tall = top + len(rows) * 1.06 * row
    figure = _set_by_hand(9, tall)
    for index, (label, images) in enumerate(rows):
        bottom = 1 - (top + (index + 1) * 1.06 * row) / tall
        axes = figure.add_axes((left / 9, bottom, (across - left) / 9, row / tall))
        padding = images.new_ones(columns - len(images), *images.shape[1:])
        axes.imshow(tile(torch.cat([images, padding]), columns).numpy(), interpolation="nearest")
        axes.set_axis_off()
        where = axes.transAxes
        axes.text(-0.01, 0.5, label, ha="right", va="center", fontsize=9, transform=where)
    if title:
        figure.suptitle(title)
    return figure


def samples_figure(images: Tensor, prior: str = "N(0, I)", columns: int = 10) -> Figure:
    """Pictures decoded from samples of the prior of this name."""
    figure = new_figure(8, 8.4)
    axes = figure.subplots()
    axes.imshow(tile(images, columns).numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"Decoded from z ~ {prior}: pictures that were never in the data")
    return figure


def curves_figure(history: Sequence[Row], baseline: float) -> Figure:
    """ELBO with the baseline, and its two parts, over epochs."""
    figure = new_figure(12, 4)
    epochs = [row["epoch"] for row in history]
    for axes, (name, title) in zip(
        figure.subplots(1, 3),
        (
            ("elbo", "ELBO (higher is better)"),
            ("rate", "rate: KL(q(z|x) || p(z))"),
            ("distortion", "distortion: -log p(x|z)"),
        ),
        strict=True,
    ):
        axes.plot(epochs, [row[name] for row in history], label="held-out", marker=".", color="C0")
        training = [row[f"train_{name}"] for row in history]
        axes.plot(epochs, training, label="training", color="C0", alpha=0.4)
        if name == "elbo":
            axes.axhline(baseline, color="C1", linestyle="--", label="probabilistic PCA, exact")
            _skip_the_descent(axes, history, baseline)
        axes.set(xlabel="epoch", ylabel="nats per image", title=title)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure


def _skip_the_descent(axes: Axes, history: Sequence[Row], baseline: float) -> None:
    """The first epochs may lie orders of magnitude below: show the part where models differ."""
    high = max(baseline, *(max(row["elbo"], row["train_elbo"]) for row in history))
    low = min(baseline, history[len(history) // 4]["elbo"])
    margin = 0.1 * (high - low) + 1
    axes.set_ylim(low - margin, high + margin)
