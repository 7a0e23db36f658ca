"""The parts of the GPU acceptance check that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_check import Outcome, Step, last_line
from fused_elbo import use_backend


def step(program: str, limit: int = 30, **options: object) -> Step:
    return Step("a step", (sys.executable, "-c", program), limit, last_line, **options)


def test_the_quick_plan_ends_within_eight_minutes_whatever_hangs() -> None:
    assert sum(step.limit for step in gpu_check.plan(quick=True)) <= 480


def test_the_plan_covers_tests_graphs_sanitizers_benchmarks_and_roofline() -> None:
    commands = [" ".join(step.command) for step in gpu_check.plan(quick=False)]
    for part in ("pytest", "graphs", "memcheck", "racecheck", "initcheck", "-m benchmarks", "roof"):
        assert any(part in command for command in commands), part
    assert any("--backends=cuda,triton" in command for command in commands)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_runs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu_check.ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu-check: needs a GPU: no CUDA device")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_step_reports_success_and_failure_with_its_output() -> None:
    good = gpu_check.run(step("print('fine')"))
    assert (good.status, good.detail) == ("passed", "fine")
    bad = gpu_check.run(step("import sys; print('why'); sys.exit(3)"))
    assert (bad.status, bad.detail) == ("FAILED", "why")


def test_a_step_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(4); open({str(tmp_path / 'alive')!r}, 'w')"
    program = (
        "import subprocess, sys; print('begun', flush=True);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    started = time.monotonic()
    outcome = gpu_check.run(step(program, limit=1))
    assert (outcome.status, outcome.output) == ("TIMED OUT", "begun\n")
    time.sleep(max(0.0, started + 5.5 - time.monotonic()))
    assert not (tmp_path / "alive").exists()


def test_a_step_whose_program_is_not_installed_is_left_out_and_no_failure() -> None:
    outcome = gpu_check.run(step("", needs="no-such-program"))
    assert outcome.passed
    assert (outcome.status, outcome.detail) == ("left out", "no-such-program is not installed")


def test_a_step_has_its_environment() -> None:
    program = "import os; print(os.environ['WANTED'], os.environ['PATH'])"
    outcome = gpu_check.run(step(program, environment={"WANTED": "here"}))
    assert outcome.detail == last_line(f"here {os.environ['PATH']}")


def test_details_are_found_in_what_the_tools_print() -> None:
    pytest_output = (
        "FAILED tests/ops/a.py::b - AssertionError\n"
        "============ 1 failed, 20 passed, 2 skipped in 3.21s ============\n"
    )
    assert gpu_check.pytest_detail(pytest_output) == (
        "1 failed, 20 passed, 2 skipped in 3.21s: tests/ops/a.py::b"
    )
    assert gpu_check.pytest_detail("20 passed in 3.21s\n") == "20 passed in 3.21s"
    racecheck = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert gpu_check.sanitizer_detail(racecheck) == "1 hazard displayed (1 error, 0 warnings)"
    assert gpu_check.sanitizer_detail("========= ERROR SUMMARY: 0 errors\n") == "0 errors"
    environment = "devices\n  cuda      NVIDIA X\nbackends\n  cuda      can run\n"
    assert gpu_check.backend_detail(environment) == "cuda: can run"


def test_the_summary_has_every_step_the_shares_and_the_failure_s_last_lines() -> None:
    speeds = json.dumps(
        {
            "copy_gb_per_s": 3000.0,
            "kernels": [{"kernel": "latent forward float32", "gb_per_s": 2700.0, "share": 0.9}],
        }
    )
    roofline = Step("roofline", (), 1, gpu_check.roofline_detail)
    tests = Step("test suite", (), 1, last_line)
    text = gpu_check.summary(
        [
            Outcome(roofline, "passed", 3.2, f"a warning\n{speeds}\n"),
            Outcome(tests, "FAILED", 10.0, "\n".join(f"line {i}" for i in range(100))),
        ],
        "A GPU",
    )
    assert text.startswith("### fused-elbo on A GPU: 1 of 2 steps failed")
    assert "| roofline | passed | 3 | copy 3000 GB/s |" in text
    assert "| latent forward float32 | 2700 | 90% |" in text
    assert "line 75\nline 76\n" in text
    assert "line 74" not in text


def test_repeated_noise_and_changing_bits_are_found_in_replays() -> None:
    noise = [[torch.randn(64, 64)] for _ in range(3)]
    same = [noise[0], [noise[0][0].clone()]]
    gpu_parts._check_replays(noise, fresh=True)
    gpu_parts._check_replays(same, fresh=False)
    with pytest.raises(AssertionError, match="repeat"):
        gpu_parts._check_replays(same, fresh=True)
    with pytest.raises(AssertionError, match="other bits"):
        gpu_parts._check_replays(noise, fresh=False)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_parts, "seconds", lambda run: (run(), 1e-3)[1])


@pytest.mark.usefixtures("on_the_cpu")
def test_the_calls_of_the_device_parts_are_right_calls() -> None:
    """Here by the CPU kernels."""
    with use_backend("cpu"):
        assert int(gpu_parts.exercise().split()[0]) == 5 * 2 * (11 + 3 * 7)
        measured = list(gpu_parts._measured(4, 16))
    assert [(kernel, moved) for kernel, moved, _ in measured] == [
        ("latent forward float32", 4 * 16 * 12),
        ("log-likelihood forward float32", 4 * 16 * 8),
        ("latent backward float32", 4 * 16 * 20),
        ("latent forward bfloat16", 4 * 16 * 6),
        ("log-likelihood forward bfloat16", 4 * 16 * 4),
        ("latent backward bfloat16", 4 * 16 * 10),
    ]
