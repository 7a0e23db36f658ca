"""Everything that runs on Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_QUICK = "not second_order and not compiled"

#: Each group is one process. The rest of the suite of operations takes minutes on the interpreter,
#: for finite differences and compilation: `pytest tests/ops --backends=triton` runs all of it.
#: First derivatives are compared with those of float64 here too.
GROUPS = {
    "kernels": ["tests/triton/interpreted"],
    "values": [
        f"tests/ops/test_{name}.py"
        for name in ("values", "reductions", "dtypes", "elbo_loss", "modules", "errors")
    ],
    "strides": [f"tests/ops/test_{name}.py" for name in ("strides", "diagonal_gaussian")],
    "policies": ["tests/ops/test_parametrizations.py", "tests/ops/test_masks.py", "-k", _QUICK],
    "noise": [f"tests/ops/test_{name}.py" for name in ("noise", "noise_key", "nonfinite")],
    "integration": [f"tests/ops/test_{name}.py" for name in ("opcheck", "purity", "backends")],
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
