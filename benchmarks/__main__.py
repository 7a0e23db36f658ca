"""`python -m benchmarks`: measure, write a table, a summary and plots, print what holds.

python -m benchmarks --quick                three minutes on two cores
python -m benchmarks --out DIR              everything
python -m benchmarks --only latent-64x16384 --providers eager,fused-cpu
python -m benchmarks --compare old.csv new.csv
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from . import plots, report, table, targets, timing
from .providers import FUSED_BACKENDS, PROVIDERS
from .runner import FULL, QUICK, Effort, Run, environment, summary
from .workloads import WORKLOADS, Workload, curve

_QUICK_POWERS = [12, 16, 18, 20, 22, 24]
_FULL_POWERS = list(range(10, 27))


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        _list()
        return 0
    if options.compare:
        before, after = (table.read(Path(p)) for p in options.compare)
        text, slower = table.compare(before, after, options.tolerance)
        print(text)
        return 1 if slower else 0
    if options.plots_only:
        print(*plots.draw(options.plots_only), sep="\n")
        return 0
    if unknown := set(options.providers) - set(PROVIDERS):
        _parser().error(f"unknown providers {', '.join(unknown)}: there are {', '.join(PROVIDERS)}")

    load_before = os.getloadavg()
    memory = timing.keep_memory_warm()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch._dynamo.config.recompile_limit = 64  # one function, many dtypes and modes
    torch.manual_seed(0)
    if options.threads or options.busy:
        torch.set_num_threads(1 if options.busy else options.threads)
    effort = QUICK if options.quick else FULL
    if options.rounds:
        effort = Effort(options.rounds, effort.sample_seconds, effort.limit_seconds)
    bandwidth = timing.bandwidth(device, options.busy)
    run = Run(device, options.quick, effort, bandwidth, options.busy, options.providers)
    workloads = _chosen(options.quick, options.only)
    if not workloads:
        _parser().error(f"--only {options.only}: no workload matches")
    fused = next((f"fused-{b}" for b in FUSED_BACKENDS if f"fused-{b}" in _names(run)), None)

    print(json.dumps(environment(run, memory, load_before), indent=1))
    out = Path(options.out)
    started = time.monotonic()
    for number, workload in enumerate(workloads, 1):
        rows = run.run(workload)
        seconds = time.monotonic() - started
        print(f"[{number}/{len(workloads)}, {seconds:.0f} s] {workload.title}")
        print(summary(rows, fused), flush=True)
        table.write(out / "results.csv", run.rows)  # kept even if the next workload is interrupted
    found = environment(run, memory, load_before)
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m benchmarks {given}".rstrip()
    (out / "summary.md").write_text(report.markdown(run.rows, found, fused, command))

    for name, reason in run.skipped.items():
        print(f"skipped: {name}: {reason}")
    if fused:
        print(targets.report(run.rows, fused, found["capability"]))
    print(
        *[out / "results.csv", out / "summary.md", *([] if options.no_plots else plots.draw(out))],
        sep="\n",
    )
    return 0


def _names(run: Run) -> list[str]:
    return [provider.name for provider in run.available()]


def _chosen(quick: bool, only: str | None) -> list[Workload]:
    standard = [w for w in WORKLOADS if w.quick or not quick or only]
    workloads = standard + curve(_QUICK_POWERS if quick else _FULL_POWERS)
    return [w for w in workloads if only is None or re.search(only, w.name)]


def _list() -> None:
    print("workloads (q: part of --quick)")
    for w in WORKLOADS:
        print(f"  {'q' if w.quick else ' '} {w.name:<24}{w.title}")
    print("    curve-latent-P, curve-likelihood-P: 2^P elements")
    print("providers")
    for p in PROVIDERS.values():
        print(f"  {'q' if p.quick else ' '} {p.name:<24}{p.what}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="what the promises need, in 3 minutes")
    parser.add_argument("--out", default="runs/benchmarks", metavar="DIR")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--only", metavar="REGEX", help="workloads by name")
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        default=list(PROVIDERS),
        metavar="A,B",
        help="default: all",
    )
    parser.add_argument("--rounds", type=int, help="default: 15 with --quick, else 41")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="for a machine that is not quiet: one thread, and its CPU time instead of wall time",
    )
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--list", action="store_true", help="workloads and providers")
    parser.add_argument(
        "--compare", nargs=2, metavar=("OLD.csv", "NEW.csv"), help="exit 1 if slower"
    )
    parser.add_argument("--tolerance", type=float, default=1.1, help="of --compare, default 1.1")
    parser.add_argument("--plots-only", type=Path, metavar="DIR", help="draw DIR/results.csv again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
