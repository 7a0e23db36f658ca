"""The net catches: faults of the kinds that kernels have, each put into a copy of the source,
each found."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..emulation.build import ROOT, build_driver


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    before: str
    after: str
    found_by: str  # a part of what is printed
    sanitize: str | None = None


FAULTS = (
    Fault(
        "missing barrier",
        "reduce.cuh",
        "warp_sums[threadIdx.x / 32] = value;\n  __syncthreads();",
        "warp_sums[threadIdx.x / 32] = value;",
        "wrong",
    ),
    Fault(
        "wrong shuffle mask",
        "reduce.cuh",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0x0000ffffu",
        "emulation: a shuffle",
    ),
    Fault(
        "barrier that a part of the block skips",
        "reduce.cuh",
        "  double total = warp_sums[0];",
        "  if (threadIdx.x < 32) __syncthreads();\n  double total = warp_sums[0];",
        "emulation: ",
    ),
    Fault(
        "tail past the end",
        "plan.h",
        "vector_ = inner_ == 1 && event_.size[last_] % unit == 0;",
        "vector_ = inner_ == 1;",
        "heap-buffer-overflow",
        "address,undefined",
    ),
    Fault(
        "misaligned vector access",
        "plan.h",
        "v.element == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0",
        "v.element == 1",
        "misaligned address",
        "address,undefined",
    ),
    Fault(
        "lost block in the final sum",
        "reduce.cuh",
        "i < count; i += kThreads",
        "i < count - 1; i += kThreads",
        "wrong",
    ),
    Fault("last block named too early", "reduce.cuh", "== count - 1;", "== count / 2;", "wrong"),
    Fault(
        "tickets not cleared", "elbo.cpp", "counted.ticket_bytes(), context", "0, context", "wrong"
    ),
    Fault(
        "wrong lane in the noise",
        "math.cuh",
        "eps[2] = c.v.y * cos.v.y;\n  eps[3] = s.v.y * sin.v.y;",
        "eps[3] = c.v.y * cos.v.y;\n  eps[2] = s.v.y * sin.v.y;",
        "z dtype",
    ),
    Fault(
        "mask read at the wrong element", "elements.cuh", "bytes[j * ", "bytes[(j ^ 1) * ", "masked"
    ),
    Fault(
        "gradient of what does not count",
        "elements.cuh",
        "grad_mean[j] = counts[j] ? grad_mean[j] : Acc(0);",
        "grad_mean[j] *= counts[j];",
        "masked",
    ),
    Fault(
        "variance where all elements count",
        "likelihood.cuh",
        "        if (!counts[j]) continue;\n        ++count;",
        "        ++count;\n        if (!counts[j]) continue;",
        "masked",
    ),
    Fault(
        "noise of another row",
        "latent.cpp",
        "(a.key.row_offset) *",
        "(a.key.row_offset + 1) *",
        "z dtype",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_seeded_fault_is_found(fault: Fault, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc" / "cuda" / fault.file
    text = file.read_text()
    assert text.count(fault.before) >= 1, "the source has changed: seed this fault anew"
    file.write_text(text.replace(fault.before, fault.after))

    driver = build_driver(fault.sanitize, tmp_path, level="-O0")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    try:
        done = subprocess.run(
            [str(driver), "quick"], capture_output=True, text=True, env=environment
        )
    finally:
        shutil.rmtree(driver.parent)
    assert done.returncode != 0
    assert fault.found_by in done.stderr, done.stderr[-2000:]


def test_the_source_without_a_fault_passes_the_same_run() -> None:
    done = subprocess.run([str(build_driver(level="-O0")), "quick"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]
