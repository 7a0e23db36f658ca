"""The report of `python -m fused_elbo.env`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from fused_elbo import _library, env


@pytest.fixture
def archs(monkeypatch: pytest.MonkeyPatch) -> None:
    info = _library.build_info()
    assert info is not None
    built = replace(info, cuda_archs=["75", "80", "86", "120+PTX"])
    monkeypatch.setattr(_library, "build_info", lambda: built)


@pytest.mark.usefixtures("archs")
@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((8, 0), "runs the code for 80"),
        ((8, 9), "runs the code for 86"),
        ((12, 1), "runs the code for 120"),
        ((13, 0), "runs the PTX for 120"),
        ((7, 0), "no code built in"),
        ((9, 0), "no code built in"),
    ],
)
def test_a_device_runs_code_of_its_own_major_version_or_older_ptx(
    capability: tuple[int, int], served: str
) -> None:
    assert env.machine_code(*capability).startswith(served)


def test_the_report_names_versions_isa_archs_and_every_backend() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fused_elbo.env"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    rows = {line[2:24].strip(): line[24:] for line in done.stdout.splitlines() if line[0] == " "}
    assert rows["loads"] == "yes"
    assert rows["built for"].startswith("torch >= 2.10, CPython >= 3.10")
    assert _library.isa_level() + " in use" in rows["CPU ISA"]
    info = _library.build_info()
    assert info is not None
    assert rows["CUDA archs"].split() == info.cuda_archs or info.cuda_note in rows["CUDA archs"]
    # In a process of its own: in this one an emulation may be in the place of cuda.
    ask = "import json; from fused_elbo import backends; print(json.dumps(backends.status()))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    backends = json.loads(answer.stdout)
    assert [name for name, _ in backends] == ["cpu", "cuda", "triton", "reference"]
    for name, reason in backends:
        assert rows[name] == ("can run" if reason is None else f"cannot run: {reason}")


def test_a_broken_extension_is_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "reason", lambda: "libtorch.so: no such file")
    assert "no: libtorch.so: no such file" in env.report()
