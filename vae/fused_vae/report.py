"""``fused-vae report RUN``: one page, readable offline, for somebody who met VAEs last week."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import study
from .answers import why_it_works
from .errors import UserError
from .panels import Panel, Row, what_it_learned
from .run_folder import CONFIG, RunFolder, read_checkpoint, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(run: str | Path) -> Path:
    """Write report.html and report.json into a complete run folder; returns the page.

    Raises:
        UserError: not a complete run, its data are gone, or the folder is not writable.
    """
    folder = RunFolder(run)
    folder.folder = folder.final
    if not (folder.final / CONFIG).is_file():
        raise UserError(f"{run}: is not a complete run (there is no {CONFIG} in it)")
    summary = read_json(folder.final / "summary.json")
    history = read_checkpoint(folder.final)[1]["history"]
    material = study.prepare(folder.final)
    result = study.measure(folder.final, material)
    chapters = {
        "What it learned": what_it_learned(material, result, summary, history),
        "Why does it work?": why_it_works(result, summary),
    }
    page = _page(folder.final.name, _told(material), summary, chapters)
    folder.write_json("report.json", result.numbers())
    folder.write("report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return folder.final / "report.html"


def _inline(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_panel(panel: Panel) -> str:
    """One figure of the page."""
    return (
        f"<figure><h3>{html.escape(panel.title)}</h3>"
        f'<img alt="{html.escape(panel.title)}" src="{_inline(panel.figure)}">'
        f"<figcaption><p>{html.escape(panel.shown)}</p>"
        f"<p><b>{html.escape(panel.meaning)}</b></p></figcaption></figure>"
    )


STYLE = """
body { font: 17px/1.55 system-ui, sans-serif; color: #222; background: #fafafa; margin: 0 auto;
       max-width: 60rem; padding: 1.5rem; }
figure { background: #fff; border: 1px solid #ddd; border-radius: 8px; margin: 1.5rem 0;
         padding: 1rem 1.5rem; }
img { max-width: 100%; display: block; margin: 0 auto; }
h1 { font-size: 2rem; } h2 { margin-top: 3rem; } h3 { margin: 0 0 .5rem; }
table { border-collapse: collapse; } td { padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
td:nth-child(2) { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
blockquote { border-left: 4px solid #bbb; margin: 1rem 0; padding: .2rem 1rem; color: #444; }
""".strip()

INTRODUCTION = (
    "A variational autoencoder turns a picture x into a small code z (not a point but a"
    " distribution q(z|x)) and z back into a picture. All numbers are in nats per held-out picture"
    " (1 nat = 1.44 bits)."
)

QUESTION = (
    "Training pulls every q(z|x) toward N(0, I), so the distributions of Bob and of Alice become"
    " more alike the longer we train. A sample from Bob's posterior should then decode to Alice"
    " often, and a pixel-wise squared error between the two seems wrong. Why does it work?"
)

ANSWER = (
    "Because the KL is a price and not a command. It splits exactly into what a code tells about"
    " its picture, and how far the mixture of all codes is from the prior; only the second part is"
    " waste. A code that could mean Bob or Alice would be a little cheaper and would cost far more"
    " in distortion, so the encoder pays to keep them apart, as long as the price (beta, or the"
    " decoder's sigma) is not too high. Here are the numbers of this model."
)


def _told(material: study.Material) -> str:
    """What was trained, in one sentence or two."""
    config = material.config
    told = (
        f"{material.held_out.name}: trained for {config.epochs} epochs, {material.queries} held-out"
        f" pictures looked at here; {config.architecture().describe()},"
        f" {config.variance} variance, beta = {config.beta:g}."
    )
    if config.beta != 1:
        told += " Training weighted the rate with beta; every ELBO below is the bound itself."
    return told


def _page(name: str, told: str, summary: Row, chapters: dict[str, list[Panel]]) -> str:
    facts: list[tuple[str, float, str]] = [
        ("ELBO", summary["elbo"], "a lower bound on log P(picture): -(rate + distortion)"),
        ("rate", summary["rate"], "KL(q(z|x) || p(z)), the price of the code"),
        *_layers(summary),
        ("distortion", summary["distortion"], "-log p(x|z), what the code leaves open"),
        ("log p(x), at least", summary["log_prob_bound"], "tighter, by importance sampling"),
        ("probabilistic PCA", summary["baseline_log_prob"], "log p(x) of the best linear model"),
    ]
    rows = "".join(
        f"<tr><td>{html.escape(n)}</td><td>{v:,.1f}</td><td>{html.escape(t)}</td></tr>"
        for n, v, t in facts
    )
    learned, why = chapters.items()
    return _document(
        f"What the VAE of {name} learned",
        f"<p>{html.escape(told)}</p><p>{html.escape(INTRODUCTION)}</p><table>{rows}</table>"
        + _chapter(*learned)
        + _chapter(*why, f"<blockquote>{QUESTION}</blockquote><p>{ANSWER}</p>"),
    )


def _layers(summary: Row) -> list[tuple[str, float, str]]:
    """The rate of each stochastic layer, where there are several."""
    rates = [(k, v) for k, v in summary.items() if k.startswith("rate_")]
    return [
        (f"rate of layer {layer}", nats, "top" if layer == 1 else "given the layers above it")
        for layer, (_, nats) in enumerate(rates, start=1)
    ]


def render_document(title: str, introduction: str, panels: Sequence[Panel]) -> str:
    """A page of one chapter."""
    body = "".join(map(render_panel, panels))
    return _document(title, f"<p>{html.escape(introduction)}</p>{body}")


def _chapter(title: str, panels: Sequence[Panel], opening: str = "") -> str:
    return f"<h2>{html.escape(title)}</h2>{opening}" + "".join(map(render_panel, panels))


def _document(title: str, body: str) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{title}</h1>{body}</html>\n"
    )
