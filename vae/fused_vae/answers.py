"""The second chapter of the report: why a sample of Bob's posterior does not decode to Alice. Two
sentences for each figure, as in `panels`.
"""

from __future__ import annotations

import math

import torch

from . import plots
from .panels import Panel, Row
from .study import Study

TIMES = {"early": "after one epoch", "late": "at the end"}
COLLAPSED = 0.1
"""Nats of information below which a code is said to tell nothing."""

MOST_BINS = 600
"""Of a histogram; a few wild residuals would ask for millions."""

OVERLAP_SHOWN = 1e-100
"""The least overlap that a bar can show."""


def why_it_works(result: Study, summary: Row) -> list[Panel]:
    """The answer to the newcomer's question, in numbers."""
    return [
        _retrieval(result),
        _information(result),
        _shuffled(result),
        _overlap(result),
        _residuals(result, summary),
    ]


def _retrieval(result: Study) -> Panel:
    n, cap = result.candidates, result.information.cap
    counts = _powers(n)
    figure = plots.new_figure(8, 4)
    axes = figure.subplots()
    axes.plot(counts, [result.retrieval(c) for c in counts], marker="o", label="densest posterior")
    axes.plot(counts, [result.match(c) for c in counts], marker="s", label="nearest picture")
    chance = torch.logspace(math.log10(2), math.log10(n), 100).tolist()
    axes.plot(chance, [1 / c for c in chance], "k:", label="chance, 1/N")
    axes.set(xscale="log", xlabel="candidates N", ylabel="own picture wins", ylim=(-0.03, 1.05))
    information = max(result.information.lower, 0.0)
    if math.log(2) < information < cap - 0.5:
        label = f"ln N = I(x; z), at least {information:.1f} nats"
        axes.axvline(math.exp(information), color="C2", linestyle="--", label=label)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    share, match = result.retrieval(n), result.match(n)
    if share > 0.9 and match > 0.8:
        verdict = (
            "so a sample for Bob practically never means Alice, and comparing its decoding with"
            " Bob's own pixels compares the right pair"
        )
    elif share > 0.9:
        verdict = (
            "so a sample for Bob practically never means Alice, and what makes the decoded picture"
            f" miss is blur that a look-alike among {n} pictures fits better (against one other"
            f" picture it wins in {result.match(2):.1%})"
        )
    elif share > 3 / n and share > 0.1:
        verdict = "so posteriors overlap, and the worry of the question is partly justified here"
    elif result.retrieval(2) > 0.75:
        verdict = (
            f"so the code tells two pictures apart (in {result.retrieval(2):.1%} of the draws) but"
            f" not {n}, and the worry of the question is mostly right here"
        )
    else:
        verdict = "so the code hardly says which picture it came from" + (
            ": the posterior has collapsed, and the worry of the question is right"
            if information < COLLAPSED
            else ", and the worry of the question is right"
        )
    return Panel(
        "Would a sample for Bob decode to Alice?",
        "For z drawn from the posterior of one picture: how often its density is highest under"
        " that very posterior, and how often its decoding is nearer to that very picture, among up"
        f" to {n} candidates; it turns from chance to certainty as I(x; z) passes ln N.",
        f"Among {n} candidates the right posterior wins in {share:.1%} and the right picture in "
        f"{match:.1%} of the draws, where guessing would give {1 / n:.2%}, {verdict}.",
        figure,
    )


def _information(result: Study) -> Panel:
    info, n = result.information, result.candidates
    lower, upper = max(info.lower, 0.0), max(min(info.upper, result.rate), 0.0)
    figure = plots.new_figure(8, 2.4)
    axes = figure.subplots()
    bars = {
        "I(x; z), at least": lower,
        "I(x; z), at most": upper,
        "rate E KL(q(z|x) || p)": result.rate,
    }
    axes.barh(list(bars), list(bars.values()), color=["C0", "C0", "C1"])
    axes.axvline(info.cap, color="k", linestyle=":", label=f"ln N = {info.cap:.1f}")
    axes.invert_yaxis()
    axes.set_xlabel("nats")
    axes.legend(frameon=False)
    if info.lower > info.cap - 0.5:
        naming = (
            f"naming one of {n} pictures takes no more than {info.cap:.1f}, where the lower bound"
            " stops: the pull toward the prior is felt by the mixture of all posteriors, and each"
            " of them can stay where it is"
        )
    else:
        naming = (
            f"naming one of {n} pictures takes {info.cap:.1f}, so codes of different pictures must"
            " be confused"
        )
    return Panel(
        "Where the rate goes",
        "Averaged over pictures the KL is exactly I(x; z) + KL(q(z) || p), what a code tells about "
        "its picture plus how far the mixture of all codes is from the prior; the bounds on I(x; z)"
        f" come from {n} posteriors (arXiv:1905.06922), and the lower one cannot exceed ln {n} ="
        f" {info.cap:.1f} nats, whatever the truth is.",
        f"Of a rate of {result.rate:.1f} nats at least {lower:.1f} and at most {upper:.1f} are"
        f" information about the picture, and {naming}.",
        figure,
    )


def _shuffled(result: Study) -> Panel:
    names = {"same_class": "another of the same class", "other": "any other picture"}
    bars = {names[k]: v for k, v in result.distortion_excess.items()}
    figure = plots.new_figure(8, 2)
    axes = figure.subplots()
    axes.barh(list(reversed(bars)), list(reversed(bars.values())), color="C3")
    axes.set_xlabel("distortion above that of the own code, nats")
    excess, cost = result.distortion_excess["other"], math.log(result.candidates)
    price = f"{excess:.0f}" if excess >= 0.5 else "no"
    return Panel(
        "What a mix-up would cost",
        "How much the distortion grows when posteriors are shuffled, so that a picture is compared "
        "with what another picture's code decodes to.",
        f"Mixing two pictures up costs {price} nats, and telling {result.candidates} apart"
        f" takes ln N = {cost:.1f}: "
        + (
            "the squared error between Bob and Alice is the force that keeps their codes apart."
            if excess > cost
            else "here there is little to lose, so the encoder does not keep them apart."
        ),
        figure,
    )


def _overlap(result: Study) -> Panel:
    figure = plots.new_figure(8, 3)
    axes = figure.subplots()
    names = list(result.overlap)
    labels = {"within": "one class", "between": "different classes"}
    if any(math.isnan(overlap.within) for overlap in result.overlap.values()):
        labels = {"between": "any two pictures"}
    width, least = 0.76 / len(labels), 0.1
    for place, (kind, label) in enumerate(labels.items()):
        values = [max(getattr(result.overlap[name], kind), OVERLAP_SHOWN) for name in names]
        least = min(least, *values)
        offset = (place - (len(labels) - 1) / 2) * width
        axes.bar([i + offset for i in range(len(names))], values, 0.95 * width, label=label)
    axes.set(yscale="log", ylim=(least / 10, 2), ylabel="mean overlap of two posteriors")
    axes.set_xticks(range(len(names)), [TIMES[name] for name in names])
    axes.legend(frameon=False)
    late = result.overlap["late"].between
    pair = "two pictures of different classes" if "within" in labels else "two pictures"
    if "early" not in result.overlap:
        trend = f"At the end the mean overlap of {pair} is {late:.1g}, where 1 would be the same"
    else:
        early = result.overlap["early"].between
        change = f"the mean overlap of {pair} went from {early:.2g} to {late:.2g}"
        trend = (
            f"Posteriors move apart as training goes on, not together: {change}"
            if late < early
            else f"Posteriors did not move apart during training: {change}"
        )
    return Panel(
        "Do posteriors become more alike?",
        "The overlap of two pictures' posteriors (the integral of the square root of their "
        "product: 1 if they are equal, 0 if disjoint"
        + ("), " if result.gaussian else "; estimated from one sample of each), ")
        + (
            "averaged within and between classes, early and late in training."
            if "within" in labels
            else "averaged over pairs, early and late in training."
        ),
        f"{trend}.",
        figure,
    )


def _residuals(result: Study, summary: Row) -> Panel:
    rms = float(result.residuals.square().mean().sqrt())
    tails = float(result.residuals.double().pow(4).mean()) / rms**4  # 3 for a normal
    reach = max(5, math.ceil(float(result.residuals.abs().max())))
    figure = plots.new_figure(8, 3)
    axes = figure.subplots()
    x = torch.linspace(-reach, reach, min(20 * reach, MOST_BINS) + 1)
    axes.hist(result.residuals.tolist(), bins=x.tolist(), density=True, label="residuals / sigma")
    normal = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    axes.plot(x.tolist(), normal.tolist(), label="N(0, 1)")
    axes.set(yscale="log", ylim=(1e-5, None), xlabel="(x - decoded) / sigma", ylabel="density")
    axes.legend(frameon=False)
    sigma = summary["sigma"]
    stated = "its own sigma per pixel" if math.isnan(sigma) else f"sigma = {sigma:.3f}"
    size = "about as large as it says"
    if rms < 0.9:
        size = "smaller than it says, so sigma is larger than it should be"
    elif rms > 1.1:
        size = "larger than it says, so sigma is too small for pictures it has not seen"
    shape = ", and their tails are those of a normal curve or lighter"
    if tails > 4:
        shape = "; the tall peak and the long tails say that " + (
            "the noise of a pixel is not normal"
            if math.isnan(sigma)
            else "one sigma is too large for the background and too small for edges"
        )
    return Panel(
        "Is the noise what the decoder says?",
        "Residuals of held-out pixels in units of what the decoder assumes "
        f"({stated}), beside the normal curve that it assumes.",
        f"Their root mean square is {rms:.2f}, {size}{shape}.",
        figure,
    )


def _powers(most: int) -> list[int]:
    counts = [n for k in range(12) for n in (10**k, 2 * 10**k, 5 * 10**k) if 2 <= n < most]
    return [*counts, most]
