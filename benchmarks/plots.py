"""Pictures of a results.csv: speed-up, the cost curve with the bandwidth floor, and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import table
from .providers import FUSED_BACKENDS
from .table import Row
from .workloads import WORKLOADS

_COLORS = {
    "eager": "#8a8f98",
    "compile": "#d98e04",
    "compile-max": "#b85c00",
    "functional": "#6a9fb5",
    "diffusers": "#b56a9f",
    "distributions": "#9fb56a",
    "fused-cpu": "#3a7d44",
    "fused-cuda": "#76b900",
    "fused-triton": "#1f77b4",
}


def draw(folder: Path) -> list[Path]:
    """Writes the PNGs that the rows of ``folder``/results.csv allow, next to it; returns them."""
    import matplotlib

    matplotlib.use("Agg")
    rows = table.read(folder / "results.csv")
    written = []
    for name, picture in (("speedup", _speedup), ("cost", _cost), ("memory", _memory)):
        figure = picture(rows, folder)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight")
            written.append(path)
    return written


def _conditions(row: Row, folder: Path) -> str:
    found = _environment(folder)
    load = found.get("load_average_after", [0])[0]
    clock = str(found.get("clock", "wall")).split(" of ")[0].removesuffix(" time")
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    return (
        f"{row.device}, {threads}, torch {row.torch}, fused-elbo {row.fused_elbo}, float32, "
        f"forward and backward, median, {clock} time, load {load:.0f}"
    )


def _fused(rows: list[Row]) -> str | None:
    present = {row.provider for row in rows}
    return next((f"fused-{b}" for b in FUSED_BACKENDS if f"fused-{b}" in present), None)


def _by_workload(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """title -> provider -> its float32 row for forward and backward; curves left out."""
    titles = {w.name: w.title for w in WORKLOADS}
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.which == "both" and row.dtype == "float32" and row.workload in titles:
            grouped.setdefault(titles[row.workload], {})[row.provider] = row
    return grouped


def _speedup(rows: list[Row], folder: Path) -> Any:
    import matplotlib.pyplot as plt

    ours = _fused(rows)
    groups = {t: g for t, g in _by_workload(rows).items() if ours in g and "eager" in g}
    if ours is None or not groups:
        return None
    others = ("eager", "compile", "functional", "diffusers")
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(groups) + 1.6))
    height = 0.8 / len(others)
    for place, other in enumerate(others):
        at = [i for i, g in enumerate(groups.values()) if other in g]
        ratios = [g[other].p50_us / g[ours].p50_us for g in groups.values() if other in g]
        positions = [i + (place - (len(others) - 1) / 2) * height for i in at]
        bars = axes.barh(positions, ratios, height, color=_COLORS[other], label=f"over {other}")
        axes.bar_label(bars, [f"{r:.1f}x" for r in ratios], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"so many times is {ours} faster (left of 1: slower)")
    axes.set_title(_conditions(next(iter(groups.values()))[ours], folder), fontsize=8)
    axes.legend(fontsize=8)
    return figure


def _cost(rows: list[Row], folder: Path) -> Any:
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.workload.startswith("curve-") and row.which == "both" and row.dtype == "float32":
            curves.setdefault((row.workload.split("-")[1], row.provider), []).append(row)
    if not curves:
        return None
    titles = {"latent": ("reparameterize_kl", 32), "likelihood": ("gaussian_log_likelihood", 20)}
    bandwidth = _bandwidth(folder)
    figure, both = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, (kind, (title, moved)) in zip(both, titles.items()):
        for (of, provider), points in curves.items():
            if of != kind:
                continue
            points = sorted(points, key=lambda r: r.elements)
            sizes = [r.elements for r in points]
            color = _COLORS.get(provider)
            axes.plot(sizes, [r.ns_per_element for r in points], "o-", label=provider, color=color)
            low = [1e3 * r.p20_us / r.elements for r in points]
            high = [1e3 * r.p80_us / r.elements for r in points]
            axes.fill_between(sizes, low, high, alpha=0.2, color=color)
        if bandwidth:
            floor = moved / bandwidth
            label = f"{moved} bytes at {bandwidth:.1f} GB/s"
            axes.axhline(floor, color="black", linestyle="--", linewidth=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("elements")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    both[0].set_ylabel("ns per element")
    figure.suptitle(
        _conditions(next(iter(curves.values()))[0], folder) + ", p20 to p80 shaded", fontsize=8
    )
    return figure


def _environment(folder: Path) -> dict[str, Any]:
    """The environment.json beside the table, if it is there."""
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _bandwidth(folder: Path) -> float | None:
    """GB/s."""
    found = _environment(folder)
    return found.get("triad_gb_per_s") or found.get("copy_gb_per_s")


def _memory(rows: list[Row], folder: Path) -> Any:
    import matplotlib.pyplot as plt

    ours = _fused(rows)
    groups = {t: g for t, g in _by_workload(rows).items() if ours in g and "eager" in g}
    groups = {t: g for t, g in groups.items() if g["eager"].elements >= 1 << 16}
    if not groups:
        return None
    figure, both = plt.subplots(1, 2, figsize=(11, 0.5 * len(groups) + 1.6), sharey=True)
    columns = (
        ("saved_bytes", "kept for backward"),
        ("peak_bytes", "peak, outputs and gradients included"),
    )
    providers = ("eager", "compile", "diffusers", ours)
    height = 0.8 / len(providers)
    for axes, (column, title) in zip(both, columns):
        for place, provider in enumerate(providers):
            at = [i for i, g in enumerate(groups.values()) if provider in g]
            held = [g[provider] for g in groups.values() if provider in g]
            values = [(getattr(r, column) or 0) / r.elements for r in held]
            positions = [i + (place - (len(providers) - 1) / 2) * height for i in at]
            bars = axes.barh(positions, values, height, color=_COLORS[provider], label=provider)
            axes.bar_label(bars, [f"{v:.0f}" for v in values], fontsize=7, padding=2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("bytes per element")
        axes.set_yticks(range(len(groups)), groups)
    both[0].invert_yaxis()
    both[1].legend(fontsize=8)
    figure.suptitle(_conditions(next(iter(groups.values()))["eager"], folder), fontsize=8)
    return figure
