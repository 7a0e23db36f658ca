"""The acceptance check for whoever has a GPU: `make gpu-check`, or

    python -m benchmarks.gpu_check            # everything
    python -m benchmarks.gpu_check --quick    # within eight minutes
    python -m benchmarks.gpu_check --plan     # what would run, and for how long at most

Each step is a process of its own with a time limit; one that fails is reported and the rest still
run. The summary, to be pasted into an issue, is printed and written with every step's output to
benchmarks/results/gpu/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "gpu"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Step:
    """One process. `detail` finds the line of its output that the summary shows."""

    name: str
    command: tuple[str, ...]
    limit: int  # seconds
    detail: Callable[[str], str]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program; without it the step is left out

    def missing(self) -> bool:
        return self.needs is not None and shutil.which(self.needs) is None


@dataclass(frozen=True)
class Outcome:
    step: Step
    status: str  # "passed", "FAILED", "TIMED OUT" or "left out"
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        return self.status in ("passed", "left out")

    @property
    def detail(self) -> str:
        if self.status == "left out":
            return f"{self.step.needs} is not installed"
        return self.step.detail(self.output)


def plan(quick: bool, out: Path = OUT) -> list[Step]:
    """The steps in their order; with `quick` their limits add up to at most eight minutes."""
    python = sys.executable
    part = (python, "-m", "benchmarks.gpu_parts")
    tests = (python, "-m", "pytest", "-q", "--backends=cuda,triton", "-p", "no:cacheprovider")
    workers = ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal")
    chosen = ("tests/ops", "-m", "kernels") if quick else ("tests",)
    sanitizer = ("compute-sanitizer", "--error-exitcode", "99")
    sanitizers = [
        Step(
            f"compute-sanitizer {tool}",
            (*sanitizer, "--tool", tool, *part, "exercise"),
            60 if quick else 600,
            sanitizer_detail,
            # Its own pool would hide what lies between two tensors.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {},
            needs="compute-sanitizer",
        )
        for tool in SANITIZER_TOOLS
    ]
    bench = (python, "-m", "benchmarks", "--device", "cuda", "--out", str(out / "benchmarks"))
    few = ("--quick", "--only", "^(latent-64x16384|likelihood-unit|elbo-image)$", "--no-plots")
    return [
        Step("environment", (python, "-m", "fused_elbo.env"), 15, backend_detail),
        Step("CUDA graphs", (*part, "graphs"), 30, last_line),
        Step("roofline", (*part, "roofline"), 30, roofline_detail),
        Step("test suite", (*tests, *chosen, *workers), 150 if quick else 3600, pytest_detail),
        *sanitizers,
        Step("benchmarks", (*bench, *(few if quick else ())), 75 if quick else 3600, last_line),
    ]


def run(step: Step) -> Outcome:
    """Runs a step to its end or its limit, with everything that it has started."""
    if step.missing():
        return Outcome(step, "left out", 0.0, "")
    started = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=step.limit)
        status = "passed" if process.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "TIMED OUT"
    return Outcome(step, status, time.monotonic() - started, output)


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def pytest_detail(output: str) -> str:
    """The count of pytest's last line, and the first failures by name."""
    counts = re.findall(r"=*\s*(\d+ (?:passed|failed|error).*? in [\d.]+s)", output)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    shown = "; ".join(failed[:5]) + (f"; {len(failed) - 5} more" if len(failed) > 5 else "")
    return ": ".join(part for part in (counts[-1] if counts else last_line(output), shown) if part)


def sanitizer_detail(output: str) -> str:
    summaries = re.findall(
        r"(?:ERROR|RACECHECK) SUMMARY: (.+)", output
    )  # racecheck has one of its own
    return summaries[-1] if summaries else last_line(output)


def backend_detail(output: str) -> str:
    found = re.findall(r"^\s*cuda\s{2,}(.+)$", output, re.MULTILINE)  # the device, then the backend
    return f"cuda: {found[-1].strip()}" if found else last_line(output)


def _speeds(output: str) -> dict[str, object] | None:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                found: dict[str, object] = json.loads(line)
            except json.JSONDecodeError:
                return None
            return found
    return None


def roofline_detail(output: str) -> str:
    found = _speeds(output)
    return f"copy {found['copy_gb_per_s']:.0f} GB/s" if found else last_line(output)


def roofline_table(output: str) -> list[str]:
    """Measured shares of a copy's bandwidth, in Markdown."""
    found = _speeds(output)
    if found is None:
        return []
    kernels = found["kernels"]
    assert isinstance(kernels, list)
    rows = [f"| {k['kernel']} | {k['gb_per_s']:.0f} | {k['share']:.0%} |" for k in kernels]
    return ["", "| kernel | GB/s | of a device-to-device copy |", "|---|---|---|", *rows]


def summary(outcomes: Sequence[Outcome], device: str) -> str:
    """What is to be pasted into an issue."""
    bad = [o for o in outcomes if not o.passed]
    left_out = sum(o.status == "left out" for o in outcomes)
    verdict = f"{len(bad)} of {len(outcomes)} steps failed" if bad else "every step that ran passed"
    if left_out:
        verdict += f", {left_out} left out"
    lines = [f"### fused-elbo on {device}: {verdict}", "", "| step | | s | |", "|---|---|---|---|"]
    for o in outcomes:
        detail = o.detail.replace("|", "\\|")
        lines.append(f"| {o.step.name} | {o.status} | {o.seconds:.0f} | {detail} |")
    for o in outcomes:
        if o.step.name == "roofline" and o.status == "passed":
            lines += roofline_table(o.output)
    for o in bad:
        tail = "\n".join(o.output.splitlines()[-25:])
        lines += ["", f"<details><summary>{o.step.name}</summary>", "", "```", tail, "```", ""]
        lines += ["</details>"]
    return "\n".join(lines)


def obstacle() -> str | None:
    """Why nothing can be checked here, in one line."""
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device that torch {torch.__version__} can use"
    if torch.version.hip is not None:
        return "an AMD GPU: there `--backends=triton` of the test suite is the check"
    import fused_elbo

    reason = fused_elbo.available_backends()["cuda"]
    return None if reason is None else f"the cuda backend cannot run: {reason}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--quick", action="store_true", help="within eight minutes")
    parser.add_argument("--plan", action="store_true", help="print the steps and stop")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    options = parser.parse_args(arguments)
    steps = plan(options.quick, options.out)
    if options.plan:
        for step in steps:
            print(f"{step.name}, at most {step.limit} s: {' '.join(step.command)}")
        return 0
    if (reason := obstacle()) is not None:
        print(f"gpu-check: needs a GPU: {reason}", file=sys.stderr)
        return 2
    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps:
        print(f"{step.name} (at most {step.limit} s) ...", flush=True)
        outcome = run(step)
        outcomes.append(outcome)
        print(f"  {outcome.status}, {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
        log = re.sub(r"\W+", "-", step.name).strip("-").lower()
        (options.out / f"{log}.log").write_text(outcome.output)
        # Written after every step: an interrupted run leaves what it has found.
        text = summary(outcomes, torch.cuda.get_device_name())
        (options.out / "summary.md").write_text(text + "\n")
    print(f"\n{text}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
