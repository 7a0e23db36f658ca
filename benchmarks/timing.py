"""Seconds of a forward and a backward pass; providers in turn, so that they share the noise."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .providers import Compute
from .workloads import Inputs

PASSES = ("inference", "forward", "backward", "both")


class Pass(Protocol):
    """One repetition split in two: what `forward` returns goes into `backward`. `inference` is
    forward alone, called where gradients are off."""

    def forward(self) -> Any: ...
    def backward(self, outputs: Any) -> Any: ...
    def inference(self) -> Any: ...


class GradientPass:
    """Outputs of a provider, and the gradients of all leaves for given upstream gradients."""

    def __init__(self, compute: Compute, inputs: Inputs) -> None:
        self.compute, self.inputs = compute, inputs
        outputs = compute(inputs)
        self.upstream = [
            inputs.grad_z if inputs.grad_z is not None and i == 0 else torch.ones_like(output)
            for i, output in enumerate(outputs)
        ]

    def forward(self) -> Any:
        return self.compute(self.inputs)

    def backward(self, outputs: Any) -> Any:
        return torch.autograd.grad(outputs, self.inputs.leaves, self.upstream)

    def inference(self) -> Any:
        return self.compute(self.inputs)


@dataclass
class Times:
    """Seconds per pass, one number per round."""

    rounds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PASSES})

    def quantiles(self, which: str) -> tuple[float, float, float]:
        """p20, p50, p80."""
        values = sorted(self.rounds[which])
        if len(values) == 1:
            return (values[0],) * 3
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cuts[1], statistics.median(values), cuts[7]


def keep_memory_warm() -> str:
    """Lets malloc keep what is freed.

    By default glibc maps large outputs afresh each time, and the page faults cost more than the
    kernels: a truth about malloc that hides every difference between providers.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "as the C library does"
    kept = mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1)
    return "kept warm (no mmap, no trim)" if kept else "as the C library does"


def measure(
    passes: dict[str, Pass],
    device: torch.device,
    rounds: int,
    sample_seconds: float,
    limit_seconds: float,
    busy: bool = False,
) -> dict[str, Times]:
    """Interleaved rounds: every provider has one turn per round, of about ``sample_seconds``.

    A turn begins with a repetition that is not timed: it brings back into the caches what the other
    providers have displaced, and wakes the threads. Fewer rounds, but at least 5, where they would
    take more than ``limit_seconds``.
    """
    clock = _Cuda() if device.type == "cuda" else _Cpu(busy)
    repetitions = {}
    round_seconds = 0.0
    for name, each in passes.items():
        for _ in range(2):
            each.backward(each.forward())
        once = sum(clock.time(each, 1)[:2])
        once = min(once, sum(clock.time(each, 1)[:2]))
        repetitions[name] = max(1, min(2000, int(sample_seconds / max(once, 1e-7))))
        round_seconds += once * (1.5 * repetitions[name] + 1)
    rounds = min(rounds, max(5, int(limit_seconds / round_seconds)))
    times = {name: Times() for name in passes}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, each in passes.items():
                n = repetitions[name]
                each.backward(each.forward())
                forward, backward = clock.time(each, n)
                inference = clock.inference(each, n)
                into = times[name].rounds
                into["forward"].append(forward / n)
                into["backward"].append(backward / n)
                into["both"].append((forward + backward) / n)
                into["inference"].append(inference / n)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return times


class _Cpu:
    """Wall time; or, ``busy``, CPU time of the thread, which other processes do not lengthen."""

    def __init__(self, busy: bool) -> None:
        self.now = time.thread_time_ns if busy else time.perf_counter_ns

    def time(self, each: Pass, n: int) -> tuple[float, float]:
        forward = backward = 0
        now = self.now
        run_forward, run_backward = each.forward, each.backward
        for _ in range(n):
            start = now()
            outputs = run_forward()
            middle = now()
            grads = run_backward(outputs)
            del outputs, grads  # freeing what was saved belongs to the backward pass
            end = now()
            forward += middle - start
            backward += end - middle
        return forward * 1e-9, backward * 1e-9

    def inference(self, each: Pass, n: int) -> float:
        run = each.inference
        with torch.no_grad():
            start = self.now()
            for _ in range(n):
                run()
            return (self.now() - start) * 1e-9


class _Cuda:
    """Events on the stream: what the device spends, once the host is ahead of it."""

    def time(self, each: Pass, n: int) -> tuple[float, float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(n)]
        for start, middle, end in marks:
            start.record()
            outputs = each.forward()
            middle.record()
            grads = each.backward(outputs)
            del outputs, grads
            end.record()
        torch.cuda.synchronize()
        forward = sum(start.elapsed_time(middle) for start, middle, _ in marks)
        backward = sum(middle.elapsed_time(end) for _, middle, end in marks)
        return forward * 1e-3, backward * 1e-3

    def inference(self, each: Pass, n: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.no_grad():
            start.record()
            for _ in range(n):
                each.inference()
            end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


def bandwidth(
    device: torch.device, busy: bool = False, elements: int = 1 << 24, rounds: int = 15
) -> float:
    """Bytes per second: a STREAM triad a = b + s * c on a CPU, a copy on a GPU."""
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))

    def triad() -> None:
        torch.add(b, c, alpha=3.0, out=a)

    def copy() -> None:
        a.copy_(b)

    kernel: Callable[[], None]
    kernel, streams = (copy, 2) if device.type == "cuda" else (triad, 3)
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kernel()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) * 1e-3)
        else:
            now = _Cpu(busy).now
            begin = now()
            kernel()
            best = min(best, 1e-9 * (now() - begin))
    return streams * elements * 4 / best
