"""The promises of the package, and what a run measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .table import Row


@dataclass(frozen=True)
class Ratio:
    """Forward and backward, against eager PyTorch and torch.compile; two CPU threads, AVX-512 (with
    AVX2 `AVX2_SHARE` of it)."""

    workload: str
    vs_eager: float
    vs_compile: float
    eager: str = "eager"


# The ratios were set with AVX-512; of the prototype's, about this much was left with AVX2.
AVX2_SHARE = 0.55

RATIOS = (
    Ratio("latent-64x16384", 9, 20),
    Ratio("latent-1024x128", 5, 15),
    Ratio("latent-128x32", 3.5, 8),
    Ratio("latent-prior", 7, 14),
    Ratio("moments", 8, 16, eager="diffusers"),
    Ratio("likelihood-unit", 7, 2),
    Ratio("likelihood-scalar", 7, 2),
    Ratio("likelihood-full", 8, 1.6),
    Ratio("elbo-image", 8, 2.5),
)


@dataclass(frozen=True)
class Result:
    claim: str
    target: str
    measured: str
    holds: bool | None  # None: not measured in this run


class _Medians:
    def __init__(self, rows: list[Row]) -> None:
        self._rows = {(r.workload, r.dtype, r.provider, r.which): r for r in rows}

    def row(self, workload: str, provider: str, which: str, dtype: str = "float32") -> Row | None:
        return self._rows.get((workload, dtype, provider, which))

    def p50(self, workload: str, provider: str, which: str, dtype: str = "float32") -> float | None:
        row = self.row(workload, provider, which, dtype)
        return None if row is None else row.p50_us


def results(rows: list[Row], fused: str, capability: str | None) -> Iterator[Result]:
    """Every target of the CPU kernels that the rows can speak to; ``capability`` is that of
    `torch.backends.cpu`."""
    medians = _Medians(rows)
    scale = AVX2_SHARE if capability == "AVX2" else 1.0

    def at_most(claim: str, target: float, value: float | None, unit: str) -> Result:
        if value is None:
            return Result(claim, f"<= {target:g}{unit}", "not measured", None)
        return Result(claim, f"<= {target:g}{unit}", f"{value:.2f}{unit}", value <= target)

    def at_least(claim: str, target: float, value: float | None, unit: str) -> Result:
        if value is None:
            return Result(claim, f">= {target:g}{unit}", "not measured", None)
        return Result(claim, f">= {target:g}{unit}", f"{value:.2f}{unit}", value >= target)

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    for ratio in RATIOS:
        ours = medians.p50(ratio.workload, fused, "both")
        eager = medians.p50(ratio.workload, ratio.eager, "both")
        name = ratio.eager
        if eager is None:
            eager, name = medians.p50(ratio.workload, "eager", "both"), "eager"
        yield at_least(
            f"{ratio.workload} against {name}", scale * ratio.vs_eager, over(eager, ours), "x"
        )
        compiled = medians.p50(ratio.workload, "compile", "both")
        claim = f"{ratio.workload} against torch.compile"
        yield at_least(claim, scale * ratio.vs_compile, over(compiled, ours), "x")

    def share(workload: str, which: str) -> float | None:
        row = medians.row(workload, fused, which)
        return None if row is None or row.share is None else 100 * row.share

    for which, target in (("forward", 45), ("backward", 60)):
        claim = f"reparameterize_kl {which}, 16M elements, share of triad"
        yield at_least(claim, target, share("curve-latent-24", which), " %")
    for which in ("forward", "backward"):
        claim = f"gaussian_log_likelihood {which}, 16M elements, share of triad"
        yield at_least(claim, 80, share("curve-likelihood-24", which), " %")

    for high in (22, 26):
        per_element = [
            row.ns_per_element
            for power in range(16, high + 1)
            if (row := medians.row(f"curve-latent-{power}", fused, "both")) is not None
        ]
        enough = medians.row(f"curve-latent-{high}", fused, "both") and len(per_element) > 1
        spread = max(per_element) / min(per_element) if enough else None
        yield at_most(
            f"cost per latent element, 2^16 to 2^{high}, largest over least", 1.25, spread, "x"
        )
    for dtype in ("bfloat16", "float16"):
        for workload in ("latent-64x16384", "likelihood-unit"):
            half = medians.p50(workload, fused, "both", dtype)
            single = medians.p50(workload, fused, "both")
            yield at_most(f"{workload}, {dtype} over float32", 1.3, over(half, single), "x")

    row = medians.row("latent-64x16384", fused, "both")
    saved = None if row is None or row.saved_bytes is None else row.saved_bytes / row.elements
    yield at_most("bytes saved for backward per latent element", 0.01, saved, "")
    yield at_most(
        "8x4, forward without gradients", 4, medians.p50("latent-8x4", fused, "inference"), " us"
    )
    empty = medians.p50("latent-8x4", "empty", "both")
    claim = "8x4, forward and backward over an empty autograd.Function"
    yield at_most(claim, 1.3, over(medians.p50("latent-8x4", fused, "both"), empty), "x")


def report(rows: list[Row], fused: str, capability: str | None) -> str:
    """The table that a run prints."""
    lines = [f"{'':<70}{'target':>12}{'measured':>14}"]
    found = list(results(rows, fused, capability))
    for result in found:
        verdict = {True: "holds", False: "MISSED", None: ""}[result.holds]
        lines.append(f"{result.claim:<70}{result.target:>12}{result.measured:>14}  {verdict}")
    missed = sum(result.holds is False for result in found)
    measured = sum(result.holds is not None for result in found)
    lines.append(f"{measured - missed} of {measured} measured targets hold")
    return "\n".join(lines)
