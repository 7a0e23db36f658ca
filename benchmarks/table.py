"""The CSV: one row per workload, dtype, provider and pass, on one device."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """Times are p20, p50 and p80 of the rounds, in microseconds, for one repetition of the pass.

    `gb_per_s` counts the bytes that the pass must move, whoever does it; `share` is that over the
    bandwidth measured beside it. Memory, launches and errors are those of forward and backward
    together, on every row of a provider. Empty: not measured, or without meaning there.
    """

    device: str
    torch: str
    fused_elbo: str
    threads: int
    workload: str
    dtype: str
    provider: str
    which: str  # inference, forward, backward or both
    elements: int
    p20_us: float
    p50_us: float
    p80_us: float
    ns_per_element: float
    gb_per_s: float | None
    share: float | None
    peak_bytes: int | None
    saved_bytes: int | None
    launches: int | None
    error: float | None
    gradient_error: float | None
    rounds: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.device, self.workload, self.dtype, self.provider, self.which


COLUMNS = tuple(f.name for f in fields(Row))


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _text(v) for k, v in asdict(row).items()})


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """Raises ValueError where the file is not such a table."""
    parse = {"int": int, "float": float, "str": str}
    kinds = {f.name: str(f.type) for f in fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is not a table of python -m benchmarks: {reader.fieldnames}")
        return [
            Row(**{k: _parse(v, kinds[k], parse) for k, v in record.items()}) for record in reader
        ]


def _parse(text: str, kind: str, parse: dict[str, Any]) -> Any:
    if kind.endswith("| None"):
        return None if text == "" else parse[kind.split(" ")[0]](text)
    return parse[kind](text)


def compare(before: list[Row], after: list[Row], tolerance: float) -> tuple[str, int]:
    """A report on the fused rows that both tables have, and how many have become slower.

    Slower: the new p20 lies above the old p80 and the median has grown by more than ``tolerance``.
    """
    old = {row.key: row for row in before}
    pairs = [(old[row.key], row) for row in after if row.key in old]
    lines, slower = [], 0
    for was, now in sorted(pairs, key=lambda pair: pair[0].p50_us / pair[1].p50_us):
        ratio = now.p50_us / was.p50_us
        regressed = ratio > tolerance and now.p20_us > was.p80_us
        improved = ratio < 1 / tolerance and now.p80_us < was.p20_us
        if was.provider.startswith("fused-"):
            slower += regressed
        if regressed or improved:
            verdict = "slower" if regressed else "faster"
            lines.append(
                f"{verdict:<7}{ratio:6.2f}x  {was.p50_us:>11,.1f} -> {now.p50_us:>11,.1f} us  "
                f"{now.workload}, {now.dtype}, {now.provider}, {now.which}"
            )
    lines.append(
        f"{len(pairs)} rows in both tables ({len(before)} and {len(after)} rows); "
        f"{slower} rows of this package are slower"
    )
    return "\n".join(lines), slower
