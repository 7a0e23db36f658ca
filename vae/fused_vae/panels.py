"""The first chapter of the report: what the model learned. Each figure has two sentences, what is
shown and what it means here, and the second is chosen by what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import plots
from .analysis import ACTIVE_VARIANCE
from .architecture import sample
from .study import Material, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, float]

ALIKE = 0.5
"""Pictures of one posterior are alike where they differ by less than this share of what pictures
from the prior differ by.
"""


@dataclass(frozen=True)
class Panel:
    """One figure and its two sentences."""

    title: str
    shown: str
    meaning: str
    figure: Figure


def what_it_learned(
    material: Material, result: Study, summary: Row, history: Sequence[Row]
) -> list[Panel]:
    """The curves, and what codes decode to."""
    return [
        _curves(history, summary),
        _reconstructions(material),
        _posterior_beside_prior(material, result),
        _interpolations(material, result),
        _traversals(material, result),
        _dimensions(result),
    ]


def informative(result: Study) -> bool:
    """Whether a code says which of two pictures it came from."""
    return result.retrieval(2) > 0.95


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _curves(history: Sequence[Row], summary: Row) -> Panel:
    first, last = history[0], history[-1]
    above = last["elbo"] - summary["baseline_log_prob"]
    memory = last["train_elbo"] - last["elbo"]
    rate = (
        f"The rate went from {first['rate']:.1f} to {last['rate']:.1f} nats, since the encoder"
        " writes what saves more distortion than it costs and nothing else"
        if last["rate"] >= 0.5
        else f"The rate ended at {last['rate']:.1f} nats, since the encoder has found next to"
        " nothing to write that saves as much distortion as it costs"
    )
    linear = (
        f"; the model is {above:.0f} nats better than the best linear one"
        if above > 0
        else f"; the model is {-above:.0f} nats worse than the best linear one (it was trained too"
        " little, or its code is too dear)"
    )
    overfit = (
        f", and {memory:.0f} nats better on the pictures it trained on, which is memory."
        if memory >= 1
        else ", and as good on new pictures as on those it trained on."
    )
    return Panel(
        "Learning curves",
        "The evidence lower bound (ELBO) and the two parts it is made of, after every epoch: the "
        "rate, nats spent on the code, and the distortion, nats still missing once the code is "
        "known; the dashed line is the best linear model with as many latent dimensions.",
        rate + linear + overfit,
        plots.curves_figure(history, summary["baseline_log_prob"]),
    )


@torch.no_grad()
def _reconstructions(material: Material) -> Panel:
    x = material.x[: min(16, material.queries)]
    restored = material.model.reconstruct(x)
    moved = [f"{_rms(pictures - pictures.mean(0)):.2f}" for pictures in (restored, x)]
    return Panel(
        "Reconstructions",
        "Pictures the model has never trained on, and below each what its code decodes to.",
        f"They are off by {_rms(x - restored):.2f} per pixel (root mean square, on a scale from 0,"
        f" black, to 1, white) and differ from each other by {moved[0]} where the originals differ"
        f" by {moved[1]}: what is gone was cheaper to leave to the noise of the decoder than to"
        " write into the code.",
        plots.reconstructions_figure(x, restored),
    )


@torch.no_grad()
def _posterior_beside_prior(material: Material, result: Study) -> Panel:
    columns, model = 10, material.model
    rows: list[tuple[str, Tensor]] = []
    for index in range(min(3, material.queries)):
        copies = material.x[index].expand(columns - 1, -1, -1, -1)
        z, _ = model.sample_kl(copies, key=material.key.fold_in(10 + index))
        drawn = model.decode(z)[0]
        rows.append(("z ~ q(z | first)", torch.cat([material.x[index : index + 1], drawn])))
    latent = material.code.shape[1]
    for index in range(3):
        drawn = sample(model, columns, latent, material.key.fold_in(20 + index))
        rows.append(("z ~ prior", drawn))
    one = _rms(torch.cat([p[1:-1] - p[2:] for label, p in rows if label != "z ~ prior"]))
    prior = _rms(torch.cat([p[:-1] - p[1:] for label, p in rows if label == "z ~ prior"]))
    narrow = one < ALIKE * prior
    meaning = "the code says little about its picture."
    if narrow:
        meaning = (
            "each posterior is a small region of its own, although training pulled every one of"
            " them toward the prior."
            if informative(result)
            else "a code narrows its picture down without fixing it."
        )
    return Panel(
        "Samples of one posterior, beside samples of the prior",
        "In the upper rows the first picture is an original and the others are decoded from "
        "different samples of its posterior; the lower rows are decoded from the prior.",
        f"Two samples of one posterior decode to pictures that differ by {one:.3f} per pixel, two"
        f" of the prior by {prior:.3f}: {meaning}",
        plots.rows_figure(rows),
    )


@torch.no_grad()
def _interpolations(material: Material, result: Study) -> Panel:
    rows, ends, halfway = [], [], []
    for index in range(min(4, material.queries // 2)):
        a, b = 2 * index, 2 * index + 1
        share = torch.linspace(0, 1, 9)[:, None]
        between = material.code[a] * (1 - share) + material.code[b] * share
        drawn = material.model.decode(between)[0]
        ends.append(drawn[0] - drawn[-1])
        halfway.append(drawn[4] - (drawn[0] + drawn[-1]) / 2)
        rows.append(("", torch.cat([material.x[a : a + 1], drawn, material.x[b : b + 1]])))
    change, off = _rms(torch.stack(ends)), _rms(torch.stack(halfway))
    return Panel(
        "From one picture to another",
        "The outermost pictures are originals, and between them is what lies on the straight line "
        "from the code of one to the code of the other.",
        f"From one end to the other the decoded pictures change by {change:.2f} per pixel, and"
        f" halfway they are {off:.2f} away from both ends faded into each other: "
        + (
            "shapes change on the way, because the KL made the encoder fill the space between its"
            " codes."
            if informative(result)
            else "the code says too little for much to be seen on the way."
        ),
        plots.rows_figure(rows),
    )


@torch.no_grad()
def _traversals(material: Material, result: Study) -> Panel:
    shares, unit, what = _shares(result)
    order = shares.argsort(descending=True)[:10].tolist()
    standard = material.config.architecture().prior_name == "N(0, I)"
    steps = torch.linspace(0, 1, 11)
    rows, changes = [], []
    for dimension in order:
        z = material.code[0].expand(len(steps), -1).clone()
        codes = material.code[:, dimension]
        low, high = (-3.0, 3.0) if standard else (float(codes.min()), float(codes.max()))
        z[:, dimension] = low + (high - low) * steps
        drawn = material.model.decode(z)[0]
        changes.append(_rms(drawn - drawn.mean(0)))
        rows.append((f"z{dimension}: {shares[dimension]:.1f} {unit}".rstrip(), drawn))
    ends = [f"{what} {float(shares[order[i]]):.1f} {unit}".rstrip() for i in (0, -1)]
    return Panel(
        "What each latent dimension does",
        "One picture's code with a single dimension moved from "
        + ("-3 to 3" if standard else "the least to the greatest value that a picture has there")
        + f", dimensions in the order of their {what}.",
        f"The first dimension ({ends[0]}) moves a pixel by {changes[0]:.3f} (root mean square"
        f" over its row), the last one shown ({ends[1]}) by {changes[-1]:.3f}: "
        + (
            "what the decoder reads is what the encoder wrote and paid for."
            if informative(result)
            else "the decoder can only show what the encoder wrote, and here that does not tell"
            " two pictures apart."
        ),
        plots.rows_figure(rows),
    )


def _shares(result: Study) -> tuple[Tensor, str, str]:
    """What dimensions are ordered by, its unit, and what it is."""
    if result.kl_per_dimension is not None:
        return result.kl_per_dimension, "nats", "share of the rate"
    return result.spread, "", "variance from picture to picture"


def _dimensions(result: Study) -> Panel:
    figure = plots.new_figure(8, 3)
    axes = figure.subplots()
    (shares, _, _), active = _shares(result), result.active
    split = result.kl_per_dimension is not None
    order = shares.argsort(descending=True)
    colors = ["C0" if active[d] else "0.7" for d in order]
    axes.bar(range(len(shares)), shares[order].tolist(), color=colors)
    if len(shares) <= 40:
        axes.set_xticks(range(len(shares)), [f"z{d}" for d in order.tolist()], fontsize=8)
    axes.set(xlabel="latent dimension", ylabel="KL, nats" if split else "variance of the codes")
    used, rest = int(active.sum()), int((~active).sum())
    idle = (
        f", and the other {rest} (gray) say nothing"
        + (f" and cost {float(shares[~active].sum()):.2f} nats together" if split else "")
        if rest
        else ""
    )
    return Panel(
        "Active units",
        "The rate of each dimension, highest first: together they are the"
        f" {float(shares.sum()):.1f} nats that a picture's code costs."
        if split
        else "How much each dimension of the code varies from picture to picture, most first: the"
        f" {result.rate:.1f} nats that a code costs have no share per dimension, as a flow or a"
        " learned prior ties the dimensions together.",
        f"{used} of {len(shares)} dimensions are in use (from picture to picture their value in the"
        f" code varies, with a variance above {ACTIVE_VARIANCE}){idle}.",
        figure,
    )
