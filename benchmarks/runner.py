"""Runs workloads and providers, and fills the table."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fused_elbo

from . import costs, training
from .providers import PROVIDERS, Provider, is_fused
from .table import Row
from .timing import PASSES, GradientPass, Pass, Times, bandwidth, measure
from .workloads import Workload, make_inputs

_HALF = ("bfloat16", "float16")
# Where half precision is measured: one noise kernel, one likelihood, and what holds them together.
_HALF_WORKLOADS = frozenset({"latent-64x16384", "likelihood-unit", "moments", "elbo-image"})
_HALF_PROVIDERS = frozenset({"eager", "compile", "diffusers"})


@dataclass(frozen=True)
class Effort:
    """How long a run takes: rounds, seconds per provider and round, most seconds per workload."""

    rounds: int
    sample_seconds: float
    limit_seconds: float


QUICK, FULL = Effort(15, 0.006, 4.0), Effort(41, 0.02, 25.0)


@dataclass
class Run:
    """One run on one device: its choices, and what it has found.

    bandwidth: bytes per second, the highest that was found beside any workload so far.
    """

    device: torch.device
    quick: bool
    effort: Effort
    bandwidth: float
    busy: bool = False
    providers: list[str] = field(default_factory=lambda: list(PROVIDERS))
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def available(self) -> Iterator[Provider]:
        """The chosen providers that run here; the others are noted with their reason."""
        for name in self.providers:
            provider = PROVIDERS[name]
            if self.quick and not provider.quick:
                self.skipped[name] = "left out by --quick"
            elif (reason := provider.reason(self.device)) is not None:
                self.skipped[name] = reason
            else:
                if self.quick and provider.slow_start:
                    self.skipped[f"{name}, cost curves"] = "left out by --quick"
                yield provider

    def run(self, workload: Workload) -> list[Row]:
        """Measures one workload with every provider and dtype, all of them interleaved."""
        torch._dynamo.reset()
        costs.compiled_kernels()
        prepared: dict[tuple[str, str], Prepared] = {}
        for provider in self.available():
            for dtype in self._dtypes(workload, provider):
                try:
                    made = prepare(workload, provider, dtype, self.device)
                except Exception as error:
                    if is_fused(provider.name):
                        raise
                    first_line = str(error).strip().split("\n")[0][:200]
                    reason = f"failed: {type(error).__name__}: {first_line}"
                    self.skipped[f"{provider.name}, {workload.name}, {dtype}"] = reason
                    continue
                if made is not None:
                    prepared[provider.name, dtype] = made
        beside = bandwidth(self.device, self.busy)
        times = measure(
            {f"{name} {dtype}": p.each for (name, dtype), p in prepared.items()},
            self.device,
            self.effort.rounds,
            self.effort.sample_seconds,
            self.effort.limit_seconds,
            self.busy,
        )
        beside = max(beside, bandwidth(self.device, self.busy))
        self.bandwidth = max(self.bandwidth, beside)
        rows: list[Row] = []
        for (name, dtype), p in prepared.items():
            rows += self._rows(workload, name, dtype, p, times[f"{name} {dtype}"], beside)
        self.rows += rows
        return rows

    def _dtypes(self, workload: Workload, provider: Provider) -> tuple[str, ...]:
        if workload.curve and (not provider.curve or (self.quick and provider.slow_start)):
            return ()
        if workload.name not in _HALF_WORKLOADS:
            return ("float32",)
        if is_fused(provider.name) or (not self.quick and provider.name in _HALF_PROVIDERS):
            return ("float32", *_HALF)
        return ("float32",)

    def _rows(
        self,
        workload: Workload,
        provider: str,
        dtype: str,
        made: Prepared,
        times: Times,
        bandwidth_beside: float,
    ) -> Iterator[Row]:
        forward, backward = workload.moved_bytes(getattr(torch, dtype).itemsize)
        moved = {"forward": forward, "inference": forward, "backward": backward}
        moved["both"] = forward + backward
        if workload.kind == "elbo":  # without gradients, none is written
            moved["inference"] = 0
        for which in PASSES:
            p20, p50, p80 = times.quantiles(which)
            rate = moved[which] / p50 if moved[which] else None
            yield Row(
                device=device_name(self.device),
                torch=torch.__version__,
                fused_elbo=fused_elbo.__version__,
                threads=torch.get_num_threads(),
                workload=workload.name,
                dtype=dtype,
                provider=provider,
                which=which,
                elements=workload.elements,
                p20_us=1e6 * p20,
                p50_us=1e6 * p50,
                p80_us=1e6 * p80,
                ns_per_element=1e9 * p50 / workload.elements,
                gb_per_s=None if rate is None else rate / 1e9,
                share=None if rate is None else rate / bandwidth_beside,
                peak_bytes=made.peak,
                saved_bytes=made.saved,
                launches=made.launches,
                error=made.error,
                gradient_error=made.gradient_error,
                rounds=len(times.rounds[which]),
            )


@dataclass
class Prepared:
    """A provider ready to be timed on a workload, and what one pass of it costs besides time."""

    each: Pass
    peak: int
    launches: int
    saved: int
    error: float | None = None
    gradient_error: float | None = None


def prepare(
    workload: Workload, provider: Provider, dtype: str, device: torch.device
) -> Prepared | None:
    """None where the provider does not offer the workload."""
    inputs = make_inputs(workload, getattr(torch, dtype), device)
    if workload.kind == "training":
        if not training.offers(provider.name):
            return None
        each = training.TrainingPass(workload, inputs, provider.name)
        return _costs(each, (each.x, *each.model.parameters()), device)
    compute = provider.build(workload)
    if compute is None:
        return None
    made = _costs(GradientPass(compute, inputs), inputs.tensors.values(), device)
    # The constant that mse_loss leaves out is no error; nothing is computed by an empty function.
    constant_left_out = provider.name in ("functional", "pythae") and workload.variance == "unit"
    if not constant_left_out and provider.name != "empty" and not workload.curve:
        made.error, made.gradient_error = costs.errors(workload, compute, inputs)
    return made


def _costs(each: Pass, inputs: Iterable[torch.Tensor], device: torch.device) -> Prepared:
    each.backward(each.forward())  # compiles what is to be compiled
    compiled = costs.compiled_kernels()
    peak, launches = costs.peak_and_launches(each, device)
    if device.type == "cpu":
        launches += compiled
    return Prepared(each, peak, launches, costs.saved_bytes(each, inputs))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return re.sub(r"\s+", " ", line.split(":", 1)[1]).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(run: Run, memory: str, load_before: tuple[float, ...]) -> dict[str, object]:
    """What a reader needs to repeat the run, and to judge it."""
    capability = torch.backends.cpu.get_cpu_capability() if run.device.type == "cpu" else None
    stream = "triad" if run.device.type == "cpu" else "copy"
    return {
        "device": device_name(run.device),
        "capability": capability,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fused_elbo": fused_elbo.__version__,
        "python": platform.python_version(),
        f"{stream}_gb_per_s": round(run.bandwidth / 1e9, 1),
        "clock": "CPU time of one thread" if run.busy else "wall",
        "memory": memory,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "skipped": run.skipped,
    }


def summary(rows: list[Row], fused: str | None) -> str:
    """Median microseconds of forward and backward, and the ratio to this package."""
    lines = []
    for row in rows:
        if row.which != "both":
            continue
        ours = [r for r in rows if (r.provider, r.which, r.dtype) == (fused, "both", row.dtype)]
        ratio = f"{row.p50_us / ours[0].p50_us:7.2f}x" if ours else ""
        error = "" if row.error is None else f"error {row.error:.1e}"
        lines.append(
            f"  {row.provider:<14}{row.dtype:<10}{row.p50_us:>12,.1f} us{ratio}"
            f"{row.ns_per_element:>9.2f} ns  saved {row.saved_bytes or 0:>12,} B  {error}"
        )
    return "\n".join(lines)
