"""The emulated kernels under the sanitizers: ragged sizes, misaligned buffers, three resume
orders, all dtypes.

tests/emulation/driver compares every result with the formulas in float64, and the orders with
each other bit by bit.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from ..emulation.build import build_driver


def run_driver(sanitize: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    driver = build_driver(sanitize)
    return subprocess.run(
        [str(driver), *arguments], capture_output=True, text=True, env=environment
    )


def test_emulated_kernels_are_clean_and_right_in_every_order() -> None:
    done = run_driver("address,undefined")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ok\n"


@pytest.mark.skipif(
    os.environ.get("FUSED_ELBO_TSAN") != "1", reason="minutes: FUSED_ELBO_TSAN=1, or make tsan"
)
def test_threads_of_a_block_do_not_race() -> None:
    done = run_driver("thread", "once")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ok\n"
