"""`python -m fused_elbo.profile` and the recording of calls, on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_elbo
from fused_elbo import backends, capture, profile

from .ranges import ROOT, build_tool, parse, run_under_tool


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Records calls, as FUSED_ELBO_CAPTURE does for a process."""
    path = tmp_path / "calls.jsonl"
    monkeypatch.setattr(capture, "_path", str(path))
    monkeypatch.setattr(capture, "_calls", {})
    monkeypatch.setattr(capture.atexit, "register", lambda *_: None)
    backends.renew_selected()
    yield path
    monkeypatch.undo()
    backends.renew_selected()


def strided(*shape: int) -> torch.Tensor:
    return torch.full((shape[1], shape[0]), 1234.5).t().requires_grad_()


def test_a_recorded_call_has_shapes_strides_dtypes_and_arguments_but_no_data(
    recording: Path,
) -> None:
    mean = strided(6, 3)
    z, kl = fused_elbo.reparameterize_kl(mean, mean, num_samples=2, key=fused_elbo.NoiseKey(7, 5))
    (z.sum() + kl.sum()).backward()
    forward, backward = capture.load(recording)
    tensor = {"shape": [6, 3], "strides": [1, 6], "dtype": "float32", "device": "cpu"}
    assert (forward.op, backward.op) == ("latent_forward", "latent_backward")
    assert forward.args == [
        *(tensor, tensor, None, None, None),
        None,  # no mask
        *(7, 5, 0, 2, -1, 0, 0.0, -math.inf, math.inf, True, 1),
    ]
    assert backward.args[:2] == [tensor, tensor]
    assert backward.args[4]["strides"] == [0, 0, 0]  # the expanded gradient of a sum
    assert "1234" not in recording.read_text()


def test_equal_calls_are_written_once_and_counted(recording: Path) -> None:
    for rows in (4, 4, 8, 4):
        fused_elbo.gaussian_kl(torch.randn(rows, 3), torch.randn(rows, 3))
    assert [entry.args[0]["shape"] for entry in capture.load(recording)] == [[4, 3], [8, 3]]
    capture._write_counts(recording)
    assert [entry.calls for entry in capture.load(recording)] == [3, 1]


def test_a_rebuilt_argument_is_as_recorded() -> None:
    for tensor in (
        torch.randn(4, 6).t(),
        torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).chunk(2, 1)[1],
        torch.randn(3, 1).expand(3, 5),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(0, 3, dtype=torch.bfloat16),
    ):
        rebuilt = capture.rebuild(capture.describe(tensor))
        assert (rebuilt.shape, rebuilt.stride()) == (tensor.shape, tensor.stride())
        assert (rebuilt.dtype, rebuilt.device) == (tensor.dtype, tensor.device)
    assert capture.rebuild(-math.inf) == -math.inf


def test_a_broken_capture_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text('{"op": "latent_forward"}\n')
    with pytest.raises(ValueError, match=r"calls\.jsonl:1: not a recorded call"):
        list(capture.load(path))


def run_profile(*arguments: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "fused_elbo.profile", *arguments],
        env=variables,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_can_be_captured_and_replayed(tmp_path: Path) -> None:
    """A user's process records itself; the profile command replays it under an NVTX tool."""
    calls, log = tmp_path / "calls.jsonl", tmp_path / "log"
    user = """
import torch, fused_elbo
mean = torch.randn(6, 5, requires_grad=True)
for _ in range(3):
    z, kl = fused_elbo.reparameterize_kl(mean, mean * 2)
    fused_elbo.elbo_loss(z, z.detach(), kl=kl).loss.backward()
"""
    tool = build_tool(tmp_path)
    run_under_tool(tool, tmp_path / "unused", user, FUSED_ELBO_CAPTURE=str(calls))
    assert [(entry.op, entry.calls) for entry in capture.load(calls)] == [
        ("latent_forward", 3),
        ("elbo_forward", 3),
        ("latent_backward", 3),
    ]
    arguments = ["--capture", str(calls), "--iterations", "2", "--warmup", "1"]
    replay = f"from fused_elbo import profile; profile.main({arguments})"
    printed = run_under_tool(tool, log, replay)
    (roots,) = parse(log).values()
    assert [r.name for r in roots] == [
        "latent_forward",
        "elbo_forward",
        "latent_backward",
        "profile",
    ]
    assert [r.name for r in roots[-1].children] == [r.name for r in roots[:3]] * 2
    assert "[6, 5]" in roots[0].message
    assert f"--capture {calls}" in printed  # the command line for nsys runs the same thing


def test_the_profile_command_runs_and_tells_how_to_profile() -> None:
    printed = run_profile("latent-samples", "--iterations", "2", "--warmup", "1")
    assert "us for one forward and backward pass" in printed
    assert "nsys profile --trace=nvtx" in printed
    assert "-m fused_elbo.profile latent-samples --iterations 2 --warmup 1" in printed


def test_on_a_gpu_the_commands_capture_between_start_and_stop() -> None:
    text = profile.profiler_commands(["latent"], cuda=True)
    assert "nsys profile" in text and "--capture-range=cudaProfilerApi" in text
    assert "ncu --profile-from-start off" in text
    assert '--nvtx-include "regex:fused_elbo@' in text
    assert "dram__throughput.avg.pct_of_peak_sustained_elapsed" in text


def test_a_chrome_trace_has_the_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    assert profile.main(["latent", "--trace", str(path), "--device", "cpu"]) == 0
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    for name in ("latent_forward", "latent_backward"):
        assert any(n.startswith(f"fused_elbo: {name} ") for n in names)
    assert "CPU total" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["latent-prior", "moments"])
def test_workloads_run(name: str) -> None:
    title, prepare = profile.workloads(torch.float32, "cpu", None)[name]
    prepare()()
    assert title


def test_an_unknown_workload_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile.main(["nothing"])
    assert "no workload 'nothing'" in capsys.readouterr().err
