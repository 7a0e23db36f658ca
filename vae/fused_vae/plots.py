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
    figure = new_figure(9, 9 / (columns + 1.2) * len(rows) * 1.04 + 0.4)
    for axes, (label, images) in zip(_stack(figure, len(rows)), rows, strict=True):
        padding = images.new_ones(columns - len(images), *images.shape[1:])
        sheet = tile(torch.cat([images, padding]), columns)
        axes.imshow(sheet.numpy(), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.suptitle(title)
    return figure


def samples_figure(images: Tensor, columns: int = 10) -> Figure:
    """Pictures decoded from z ~ N(0, I)."""
    figure = new_figure(8, 8.4)
    axes = figure.subplots()
    axes.imshow(tile(images, columns).numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title("Decoded from z ~ N(0, I): pictures that were never in the data")
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


def _stack(figure: Figure, rows: int) -> list[Axes]:
    return list(figure.subplots(rows, 1, squeeze=False)[:, 0])
