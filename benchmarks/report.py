"""summary.md: what a run found, as tables that a reader can repeat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import targets
from .providers import PROVIDERS
from .table import Row
from .workloads import WORKLOADS

_VERDICT = {True: "holds", False: "**missed**", None: ""}


def markdown(rows: list[Row], environment: dict[str, Any], fused: str | None, command: str) -> str:
    """The whole page; ``fused`` is the provider that the others are compared with."""
    sections = [
        f"# {environment['device']}\n",
        f"`{command}`\n",
        *(f"- {name}: {value}" for name, value in environment.items() if name != "skipped"),
        "",
        *(f"- skipped: {name}: {reason}" for name, reason in environment["skipped"].items()),
    ]
    if fused is not None:
        sections += ["\n## Promises\n", *_promises(rows, fused, environment["capability"])]
        sections += ["\n## Where the package loses\n", *_losses(rows, fused)]
        sections += ["\n## Times\n", *_times(rows, fused)]
    return "\n".join(sections) + "\n"


def _promises(rows: list[Row], fused: str, capability: str | None) -> Iterator[str]:
    yield "| claim | target | measured | |\n|---|---|---|---|"
    for result in targets.results(rows, fused, capability):
        verdict = _VERDICT[result.holds]
        yield f"| {result.claim} | {result.target} | {result.measured} | {verdict} |"


def _titles() -> dict[str, str]:
    return {w.name: w.title for w in WORKLOADS}


def losses(rows: list[Row], fused: str, margin: float = 1.05) -> list[tuple[Row, Row]]:
    """(ours, theirs) wherever another provider is faster by more than ``margin``, worst first."""
    ours = {(r.workload, r.dtype, r.which): r for r in rows if r.provider == fused}
    found = []
    for row in rows:
        mine = ours.get((row.workload, row.dtype, row.which))
        # An empty function shows what a call costs: it is no competitor.
        if mine is None or row.provider in (fused, "empty"):
            continue
        if mine.p50_us > margin * row.p50_us:
            found.append((mine, row))
    return sorted(found, key=lambda pair: pair[1].p50_us / pair[0].p50_us)


def _losses(rows: list[Row], fused: str) -> Iterator[str]:
    found = losses(rows, fused)
    if not found:
        yield "Nowhere in this run."
        return
    yield "| workload | dtype | pass | faster | us | this package, us | ratio |"
    yield "|---|---|---|---|---|---|---|"
    titles = _titles()
    for mine, theirs in found:
        title = titles.get(mine.workload, mine.workload)
        ratio = mine.p50_us / theirs.p50_us
        yield (
            f"| {title} | {mine.dtype} | {mine.which} | {theirs.provider} "
            f"| {theirs.p50_us:,.1f} | {mine.p50_us:,.1f} | {ratio:.2f} |"
        )


def _times(rows: list[Row], fused: str) -> Iterator[str]:
    """Forward and backward of every workload but the curves; one line per provider."""
    order = {name: i for i, name in enumerate(PROVIDERS)}
    for name, title in _titles().items():
        here = [r for r in rows if (r.workload, r.which) == (name, "both")]
        if not here:
            continue
        yield f"\n### {title}\n"
        yield "| provider | dtype | p50, us | p20 to p80 | ratio | ns/element | GB/s | share |"
        yield "|---|---|---|---|---|---|---|---|"
        ours = {r.dtype: r for r in here if r.provider == fused}
        for r in sorted(here, key=lambda r: (r.dtype != "float32", r.dtype, order[r.provider])):
            ratio = f"{r.p50_us / ours[r.dtype].p50_us:.2f}" if r.dtype in ours else ""
            rate = "" if r.gb_per_s is None else f"{r.gb_per_s:.1f}"
            share = "" if r.share is None else f"{100 * r.share:.0f} %"
            yield (
                f"| {r.provider} | {r.dtype} | {r.p50_us:,.1f} | {r.p20_us:,.1f} to "
                f"{r.p80_us:,.1f} | {ratio} | {r.ns_per_element:.2f} | {rate} | {share} |"
            )
        yield "\n| provider | dtype | saved, B | peak, B | kernels | error | error of gradients |"
        yield "|---|---|---|---|---|---|---|"
        for r in sorted(here, key=lambda r: (r.dtype != "float32", r.dtype, order[r.provider])):
            yield (
                f"| {r.provider} | {r.dtype} | {r.saved_bytes or 0:,} | {r.peak_bytes or 0:,} "
                f"| {r.launches} | {_number(r.error)} | {_number(r.gradient_error)} |"
            )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
