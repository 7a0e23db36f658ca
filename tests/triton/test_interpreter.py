"""Everything that runs on Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Each group is one process; together they are the suite of operations and the tests beside this
#: file.
GROUPS = {
    "kernels": ["tests/triton/interpreted"],
    "values": [
        "tests/ops/test_values.py",
        "tests/ops/test_reductions.py",
        "tests/ops/test_dtypes.py",
    ],
    "strides": ["tests/ops/test_strides.py", "tests/ops/test_diagonal_gaussian.py"],
    "gradients": ["tests/ops/test_gradients.py", "tests/ops/test_elbo_loss.py"],
    "noise": ["tests/ops/test_noise.py", "tests/ops/test_nonfinite.py", "tests/ops/test_purity.py"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_operations_pass_on_the_interpreter(group: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--backends=triton",
        "-p",
        "no:cacheprovider",
        *GROUPS[group],
    ]
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")
    }
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**outside, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, "no test was collected"
