"""The figures of the report, each with two sentences: what is shown, and what it means here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_elbo import DiagonalGaussian

from . import plots
from .study import Material, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, float]
TIMES = {"early": "after one epoch", "late": "at the end"}


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


def why_it_works(result: Study, summary: Row) -> list[Panel]:
    """The answer to the newcomer's question, in numbers."""
    return [
        _retrieval(result),
        _information(result),
        _shuffled(result),
        _overlap(result),
        _residuals(result, summary),
    ]


def _curves(history: Sequence[Row], summary: Row) -> Panel:
    first, last = history[0], history[-1]
    return Panel(
        "Learning curves",
        "The evidence lower bound (ELBO) and the two parts it is made of, after every epoch: the "
        "rate, nats spent on the code, and the distortion, nats still missing once the code is "
        "known.",
        f"The rate went from {first['rate']:.1f} to {last['rate']:.1f} nats: the encoder writes"
        " what saves more distortion than it costs, and nothing else. The dashed line is the best"
        " that a linear model of the same size can do; a training curve above the held-out one is"
        " memory, not understanding.",
        plots.curves_figure(history, summary["baseline_log_prob"]),
    )


@torch.no_grad()
def _reconstructions(material: Material) -> Panel:
    x = material.x[: min(16, material.queries)]
    return Panel(
        "Reconstructions",
        "Pictures the model has never trained on, and below each what its code decodes to.",
        "What is gone (a texture, a hook at the end of a stroke) was cheaper to leave to the noise "
        "of the decoder than to write into the code.",
        plots.reconstructions_figure(x, material.model.reconstruct(x)),
    )


def _informative(result: Study) -> bool:
    """Whether a code says which of two pictures it came from."""
    return result.retrieval(2) > 0.95


@torch.no_grad()
def _posterior_beside_prior(material: Material, result: Study) -> Panel:
    columns, model = 10, material.model
    rows: list[tuple[str, Tensor]] = []
    for index in range(min(3, material.queries)):
        mean = material.q.mean[index].expand(columns - 1, -1)
        logvar = material.q.logvar[index].expand(columns - 1, -1)
        q = DiagonalGaussian(mean, logvar)
        drawn = model.decode(q.rsample(key=material.key.fold_in(10 + index)))[0]
        rows.append(("z ~ q(z | first)", torch.cat([material.x[index : index + 1], drawn])))
    latent = material.q.mean.shape[1]
    for index in range(3):
        drawn = model.sample(columns, latent, key=material.key.fold_in(20 + index))
        rows.append(("z ~ prior", drawn))
    return Panel(
        "Samples of one posterior, beside samples of the prior",
        "In the upper rows the first picture is an original and the others are decoded from "
        "different samples of its posterior; the lower rows are decoded from the prior.",
        (
            "All samples of one posterior are the same picture up to details, and unlike a random"
            " draw from the prior: each posterior is a small region of its own, although training"
            " pulled every one of them toward the prior."
            if _informative(result)
            else (
                "Samples of one posterior differ as much as draws from the prior do: the code says "
                "little about its picture."
            )
        ),
        plots.rows_figure(rows),
    )


@torch.no_grad()
def _interpolations(material: Material, result: Study) -> Panel:
    rows = []
    for index in range(min(4, material.queries // 2)):
        a, b = 2 * index, 2 * index + 1
        share = torch.linspace(0, 1, 9)[:, None]
        between = material.q.mean[a] * (1 - share) + material.q.mean[b] * share
        drawn = material.model.decode(between)[0]
        rows.append(("", torch.cat([material.x[a : a + 1], drawn, material.x[b : b + 1]])))
    return Panel(
        "From one picture to another",
        "The outermost pictures are originals, and between them is what lies on the straight line "
        "from the code of one to the code of the other.",
        (
            "Halfway there are pictures, not two pictures faded into each other, because the KL"
            " made the encoder use the space between its codes."
            if _informative(result)
            else "There is nothing to see on the way: all codes are nearly the same."
        ),
        plots.rows_figure(rows),
    )


@torch.no_grad()
def _traversals(material: Material, result: Study) -> Panel:
    order = result.kl_per_dimension.argsort(descending=True)[:10].tolist()
    values = torch.linspace(-3, 3, 11)
    rows = []
    for dimension in order:
        z = material.q.mean[0].expand(len(values), -1).clone()
        z[:, dimension] = values
        label = f"z{dimension}: {result.kl_per_dimension[dimension]:.1f} nats"
        rows.append((label, material.model.decode(z)[0]))
    return Panel(
        "What each latent dimension does",
        "One picture's code with a single dimension moved from -3 to 3, dimensions in the order of "
        "their share of the rate.",
        "Dimensions at the top change the picture most; one with a rate near zero would change "
        "nothing, since the decoder cannot read what the encoder did not write.",
        plots.rows_figure(rows),
    )


def _dimensions(result: Study) -> Panel:
    figure = plots.new_figure(8, 3)
    axes = figure.subplots()
    kl = result.kl_per_dimension.sort(descending=True).values
    axes.bar(range(len(kl)), kl.tolist())
    axes.set(xlabel="latent dimension, sorted", ylabel="KL to N(0, 1), nats")
    return Panel(
        "Active units",
        "The rate, dimension by dimension.",
        f"{result.active} of {len(kl)} dimensions are in use (their posterior mean moves with the "
        "picture); the others, if any, lie on the prior and cost nothing.",
        figure,
    )


def _retrieval(result: Study) -> Panel:
    counts = _powers(result.candidates)
    figure = plots.new_figure(8, 4)
    axes = figure.subplots()
    axes.plot(counts, [result.retrieval(n) for n in counts], marker="o", label="densest posterior")
    axes.plot(counts, [result.match(n) for n in counts], marker="s", label="nearest picture")
    axes.plot(counts, [1 / n for n in counts], "k:", label="chance, 1/N")
    axes.set(xscale="log", xlabel="candidates N", ylabel="own picture wins", ylim=(-0.03, 1.05))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    n = result.candidates
    share, match = result.retrieval(n), result.match(n)
    if share > 0.9:
        verdict = (
            "so a sample for Bob practically never means Alice, and comparing its decoding with"
            " Bob's own pixels compares the right pair"
        )
    elif share > 3 / n and share > 0.1:
        verdict = "so posteriors overlap, and the worry of the question is partly justified here"
    else:
        verdict = (
            "so the code does not say which picture it came from: the posterior has collapsed, "
            "and the worry of the question is right"
        )
    return Panel(
        "Would a sample for Bob decode to Alice?",
        "For z drawn from the posterior of one picture: how often its density is highest under"
        " that very posterior, and how often its decoding is nearer to that very picture, among up"
        f" to {n} candidates.",
        f"Among {n} candidates the right posterior wins in {share:.1%} and the right picture in "
        f"{match:.1%} of the draws, where guessing would give {1 / n:.2%}, {verdict}.",
        figure,
    )


def _information(result: Study) -> Panel:
    info = result.information
    upper = min(info.upper, result.rate)
    figure = plots.new_figure(8, 2.4)
    axes = figure.subplots()
    bars = {
        "I(x; z), at least": info.lower,
        "I(x; z), at most": upper,
        "rate E KL(q(z|x) || p)": result.rate,
    }
    axes.barh(list(bars), list(bars.values()), color=["C0", "C0", "C1"])
    axes.axvline(info.cap, color="k", linestyle=":", label=f"ln N = {info.cap:.2f}")
    axes.invert_yaxis()
    axes.set_xlabel("nats")
    axes.legend(frameon=False)
    saturated = info.lower > info.cap - 0.5
    lower = f"at least {info.lower:.1f} nats" + (
        f" (this bound cannot exceed ln {result.candidates} = {info.cap:.1f}, whatever the"
        " truth is)"
        if saturated
        else ""
    )
    return Panel(
        "Where the rate goes",
        "Averaged over pictures the KL is exactly I(x; z) + KL(q(z) || p): what a code tells about "
        "its picture, plus how far the mixture of all codes is from the prior.",
        f"Of a rate of {result.rate:.1f} nats {lower} and at most {upper:.1f} are information; only"
        " the rest is a mismatch with the prior. The pull toward N(0, I) acts on the mixture of"
        f" all posteriors, and telling {result.candidates} pictures apart needs no more than"
        f" {info.cap:.1f} nats.",
        figure,
    )


def _shuffled(result: Study) -> Panel:
    names = {"same_class": "another of the same class", "other": "any other picture"}
    bars = {names[k]: v for k, v in result.distortion_excess.items()}
    figure = plots.new_figure(8, 2)
    axes = figure.subplots()
    axes.barh(list(bars), list(bars.values()), color="C3")
    axes.set_xlabel("distortion above that of the own code, nats")
    excess = result.distortion_excess["other"]
    worth = excess > math.log(result.candidates)
    return Panel(
        "What a mix-up would cost",
        "How much the distortion grows when a picture is compared with what another picture's code "
        "decodes to.",
        f"Mixing two pictures up costs {excess:.0f} nats, keeping {result.candidates} of them apart"
        f" costs ln N = {math.log(result.candidates):.1f}: "
        + (
            "the squared error between Bob and Alice is the force that keeps their codes apart."
            if worth
            else "here there is little to lose, so the encoder does not keep them apart."
        ),
        figure,
    )


def _overlap(result: Study) -> Panel:
    figure = plots.new_figure(8, 3)
    axes = figure.subplots()
    names = list(result.overlap)
    tiny = 1e-12
    for offset, kind in ((-0.2, "within"), (0.2, "between")):
        values = [getattr(result.overlap[name], kind) for name in names]
        if not any(math.isnan(v) for v in values):
            label = {"within": "one class", "between": "different classes"}[kind]
            axes.bar(
                [i + offset for i in range(len(names))],
                [max(v, tiny) for v in values],
                0.38,
                label=label,
            )
    axes.set(yscale="log", ylim=(tiny, 2), ylabel="mean overlap of two posteriors")
    axes.set_xticks(range(len(names)), [TIMES[name] for name in names])
    axes.legend(frameon=False)
    late = result.overlap["late"].between
    early = result.overlap["early"].between if "early" in result.overlap else math.nan
    trend = (
        "Posteriors move apart as training goes on, not together"
        if late < early
        else "Posteriors did not move apart during training"
    )
    return Panel(
        "Do posteriors become more alike?",
        "The overlap of two pictures' posteriors (the integral of the square root of their "
        "product: 1 if they are equal, 0 if disjoint), averaged within and between classes.",
        f"{trend}: the mean overlap of different pictures went from {early:.1e} to {late:.1e}.",
        figure,
    )


def _residuals(result: Study, summary: Row) -> Panel:
    rms = float(result.residuals.square().mean().sqrt())
    tails = float(result.residuals.double().pow(4).mean()) / rms**4  # 3 for a normal
    figure = plots.new_figure(8, 3)
    axes = figure.subplots()
    x = torch.linspace(-5, 5, 101)
    axes.hist(result.residuals.tolist(), bins=x.tolist(), density=True, label="residuals / sigma")
    normal = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    axes.plot(x.tolist(), normal.tolist(), label="N(0, 1)")
    axes.set(yscale="log", ylim=(1e-5, None), xlabel="(x - decoded) / sigma", ylabel="density")
    axes.legend(frameon=False)
    sigma = summary["sigma"]
    stated = "its own sigma per pixel" if math.isnan(sigma) else f"sigma = {sigma:.3f}"
    return Panel(
        "Is the noise what the decoder says?",
        "Residuals of held-out pixels in units of what the decoder assumes "
        f"({stated}), beside the normal curve that it assumes.",
        f"Their root mean square is {rms:.2f} (1 would be exactly right on new pictures)"
        + (
            "; the tall peak and the long tails say that one sigma is too large for the "
            "background and too small for edges."
            if tails > 4
            else ", and their shape is nearly normal."
        ),
        figure,
    )


def _powers(most: int) -> list[int]:
    counts = [n for k in range(12) for n in (10**k, 2 * 10**k, 5 * 10**k) if 2 <= n < most]
    return [*counts, most]
