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


def reconstructions(path: Path, originals: Tensor, restored: Tensor, columns: int = 8) -> None:
    """Rows of originals, each with its reconstructions right below."""
    pairs = [
        part
        for pair in zip(originals.split(columns), restored.split(columns), strict=True)
        for part in pair
    ]
    figure = new_figure(9, 1.2 * len(pairs))
    for index, (axes, part) in enumerate(zip(_stack(figure, len(pairs)), pairs, strict=True)):
        padding = part.new_ones(columns - len(part), *part.shape[1:])
        axes.imshow(tile(torch.cat([part, padding]), columns).numpy(), interpolation="nearest")
        axes.set_ylabel(
            "original" if index % 2 == 0 else "through\nthe VAE",
            rotation=0,
            ha="right",
            va="center",
        )
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.suptitle("Held-out images and their reconstructions")
    figure.savefig(path, format="png")


def samples(path: Path, images: Tensor, columns: int = 10) -> None:
    """Pictures decoded from z ~ N(0, I)."""
    figure = new_figure(8, 8.4)
    axes = figure.subplots()
    axes.imshow(tile(images, columns).numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title("Decoded from z ~ N(0, I): pictures that were never in the data")
    figure.savefig(path, format="png")


def learning_curves(path: Path, history: Sequence[Row], baseline: float) -> None:
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
        axes.plot(
            epochs,
            [row[f"train_{name}"] for row in history],
            label="training",
            color="C0",
            alpha=0.4,
        )
        if name == "elbo":
            axes.axhline(baseline, color="C1", linestyle="--", label="probabilistic PCA, exact")
            _skip_the_descent(axes, history, baseline)
        axes.set(xlabel="epoch", ylabel="nats per image", title=title)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def _skip_the_descent(axes: Axes, history: Sequence[Row], baseline: float) -> None:
    """The first epochs may lie orders of magnitude below: show the part where models differ."""
    high = max(baseline, *(max(row["elbo"], row["train_elbo"]) for row in history))
    low = min(baseline, history[len(history) // 4]["elbo"])
    margin = 0.1 * (high - low) + 1
    axes.set_ylim(low - margin, high + margin)


def _stack(figure: Figure, rows: int) -> list[Axes]:
    return list(figure.subplots(rows, 1, squeeze=False)[:, 0])
