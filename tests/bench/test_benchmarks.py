"""`python -m benchmarks` on a tiny grid, its table, and the comparison of two tables."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import costs, plots, report, table, targets, timing
from benchmarks.providers import PROVIDERS
from benchmarks.table import Row
from benchmarks.workloads import KINDS, WORKLOADS, curve, make_inputs

from .ranges import ROOT

pytestmark = pytest.mark.xdist_group("benchmarks")  # what its fixtures make is made once

ROW = Row(
    *("a cpu", "2.13", "0.1", 2, "latent-64x16384", "float32", "fused-cpu", "both", 1 << 20),
    *(9e2, 1e3, 1.1e3, 1.0, 32.0, 0.8, 100, 0, 2, 1e-7, 1e-7, 15),
)


def rows(**medians: float) -> list[Row]:
    """One row per provider, with this median."""
    return [
        replace(ROW, provider=name.replace("_", "-"), p20_us=0.95 * m, p50_us=m, p80_us=1.05 * m)
        for name, m in medians.items()
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a quick run on two small workloads."""
    folder = tmp_path_factory.mktemp("benchmarks")
    providers = "eager,compile,fused-cpu,fused-cuda,functional,distributions,empty"
    options = ["--quick", "--rounds", "3", "--only", "^latent-8x4|curve-latent-12"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks",
            *options,
            "--out",
            str(folder),
            "--providers",
            providers,
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("kernels", "vae")),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_table_has_every_column_filled(tiny: tuple[Path, str]) -> None:
    with (tiny[0] / "results.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert tuple(records[0]) == table.COLUMNS
    never_empty = set(table.COLUMNS) - {"error", "gradient_error"}
    for record in records:
        assert {c for c, v in record.items() if v == ""} & never_empty == set()
    errors = [r for r in records if r["provider"] == "fused-cpu" and r["workload"] == "latent-8x4"]
    assert all(float(r["error"]) < 1e-5 and float(r["gradient_error"]) < 1e-5 for r in errors)


def test_every_provider_and_pass_of_a_workload_is_measured(tiny: tuple[Path, str]) -> None:
    found = {(r.workload, r.provider, r.which) for r in table.read(tiny[0] / "results.csv")}
    offered = {
        "latent-8x4": ("eager", "compile", "fused-cpu", "empty"),
        "curve-latent-12": ("eager", "fused-cpu"),  # no torch.compile in the curves of --quick
    }
    assert found == {
        (w, p, t) for w, names in offered.items() for p in names for t in timing.PASSES
    }


def test_costs_besides_time(tiny: tuple[Path, str]) -> None:
    by_provider = {
        r.provider: r
        for r in table.read(tiny[0] / "results.csv")
        if (r.workload, r.which) == ("latent-8x4", "both")
    }
    tensor, nats = 8 * 4 * 4, 8 * 4
    fused, eager = by_provider["fused-cpu"], by_provider["eager"]
    assert fused.saved_bytes == 8  # the seed, whatever the shape
    assert eager.saved_bytes is not None and eager.saved_bytes >= 2 * tensor  # noise and std
    # z, kl, the seed and two gradients; a little more where there is a workspace.
    assert fused.peak_bytes is not None and eager.peak_bytes is not None
    assert 3 * tensor + nats <= fused.peak_bytes < eager.peak_bytes
    assert fused.launches is not None and eager.launches is not None
    assert fused.launches <= 3 and eager.launches > 10  # the seed, forward, backward


def test_what_is_skipped_is_said(tiny: tuple[Path, str]) -> None:
    folder, printed = tiny
    skipped = json.loads((folder / "environment.json").read_text())["skipped"]
    assert skipped["distributions"] == "left out by --quick"
    assert skipped["compile, cost curves"] == "left out by --quick"
    if not torch.cuda.is_available():
        assert skipped["fused-cuda"]
    for name, reason in skipped.items():
        assert f"skipped: {name}: {reason}" in printed


def test_targets_are_printed_with_what_was_measured(tiny: tuple[Path, str]) -> None:
    assert "8x4, forward without gradients" in tiny[1]
    assert "not measured" in tiny[1]
    assert "measured targets hold" in tiny[1]


def test_plots_are_written_beside_the_table(tiny: tuple[Path, str]) -> None:
    assert {p.name for p in tiny[0].glob("*.png")} == {"speedup.png", "cost.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in plots.draw(tiny[0]))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = [ROW, replace(ROW, provider="empty", error=None, gradient_error=math.inf, share=None)]
    table.write(tmp_path / "a.csv", written)
    assert table.read(tmp_path / "a.csv") == written
    (tmp_path / "b.csv").write_text("workload,time\n")
    with pytest.raises(ValueError, match=r"b\.csv is not a table"):
        table.read(tmp_path / "b.csv")


def test_compare_finds_what_has_become_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    table.write(before, rows(fused_cpu=1000, eager=5000))
    for medians, code in (
        ({"fused_cpu": 1300, "eager": 5000}, 1),
        ({"fused_cpu": 1050, "eager": 5000}, 0),  # within the tolerance
        ({"fused_cpu": 1000, "eager": 9000}, 0),  # not ours
        ({"fused_cpu": 500, "eager": 5000}, 0),
    ):
        table.write(after, rows(**medians))
        assert command.main(["--compare", str(before), str(after)]) == code
        printed = capsys.readouterr().out
        assert ("slower   1.30x" in printed) == (code == 1)
        assert "2 rows in both tables" in printed


def test_a_target_that_is_missed_is_called_missed() -> None:
    def verdicts(capability: str = "AVX512", **medians: float) -> list[bool | None]:
        found = targets.results(rows(**medians), "fused-cpu", capability)
        return [r.holds for r in found if r.claim.startswith("latent-64x16384 against")]

    assert verdicts(fused_cpu=100, eager=950, compile=2100) == [True, True]
    assert verdicts(fused_cpu=100, eager=850, compile=2100) == [False, True]
    assert verdicts(fused_cpu=100, eager=950) == [True, None]
    assert verdicts("AVX2", fused_cpu=100, eager=500, compile=1050) == [True, False]
    report = targets.report(rows(fused_cpu=100, eager=850, compile=2100), "fused-cpu", "AVX512")
    assert ">= 9x         8.50x  MISSED" in report


def test_every_target_has_its_workload() -> None:
    names = {w.name for w in WORKLOADS}
    assert {ratio.workload for ratio in targets.RATIOS} <= names
    assert {w.name for w in WORKLOADS if w.quick} >= {ratio.workload for ratio in targets.RATIOS}
    assert {w.kind for w in WORKLOADS} == set(KINDS)


@pytest.mark.parametrize(
    "workload", [w for w in WORKLOADS if w.kind != "training"], ids=lambda w: w.name
)
def test_eager_and_fused_compute_the_same_nats(workload: object) -> None:
    """Each formula is the one it is compared with: a wrong one would be fast in vain."""
    small = replace(  # type: ignore[type-var]
        workload,
        shape=tuple(min(n, 6) for n in workload.shape),  # type: ignore[attr-defined]
        latent=tuple(min(n, 6) for n in workload.latent),  # type: ignore[attr-defined]
        samples=min(workload.samples, 6),  # type: ignore[attr-defined]
        spread=0.5,
    )
    inputs = make_inputs(small, torch.float64, torch.device("cpu"))
    for provider in ("eager", "fused-cpu"):
        compute = PROVIDERS[provider].build(small)
        assert compute is not None
        error, gradient_error = costs.errors(small, compute, inputs)
        assert error < 1e-12 and gradient_error < 1e-12


@pytest.mark.parametrize("name", ["functional", "distributions", "diffusers", "pyro", "pythae"])
def test_other_libraries_compute_the_same_gradients(name: str) -> None:
    provider = PROVIDERS[name]
    if (reason := provider.reason(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    offered = 0
    for workload in WORKLOADS:
        if workload.kind == "training" or workload.elements > 1 << 20:
            continue
        compute = provider.build(workload)
        if compute is not None:
            offered += 1
            inputs = make_inputs(workload, torch.float64, torch.device("cpu"))
            # The value may leave out a constant (mse_loss); the gradient may not.
            assert costs.errors(workload, compute, inputs)[1] < 1e-10, workload.name
    assert offered


def test_moved_bytes_are_those_of_the_formula() -> None:
    by_name = {w.name: w for w in WORKLOADS}
    latent, image = 64 * 16384, 16 * 3 * 256 * 256
    assert by_name["latent-64x16384"].moved_bytes(4) == (12 * latent, 20 * latent)
    assert by_name["likelihood-unit"].moved_bytes(4) == (8 * image, 12 * image)
    assert by_name["likelihood-full"].moved_bytes(4) == (12 * image, 20 * image)
    assert by_name["moments"].moved_bytes(2) == (6 * 16 * 4 * 64 * 64, 10 * 16 * 4 * 64 * 64)
    assert curve([16])[0].elements == 1 << 16


def test_the_summary_says_where_the_package_loses(tiny: tuple[Path, str]) -> None:
    page = (tiny[0] / "summary.md").read_text()
    for heading in ("## Promises", "## Where the package loses", "### reparameterize_kl [8, 4]"):
        assert heading in page
    assert "`python -m benchmarks --quick --rounds 3 --only" in page
    lost = report.losses(rows(fused_cpu=100, eager=90, compile=101, empty=1), "fused-cpu")
    assert [(theirs.provider, theirs.p50_us) for _, theirs in lost] == [("eager", 90)]


class _Sleeps:
    """A pass during which the thread waits, as it does while another process has the core."""

    def forward(self) -> None:
        time.sleep(2e-3)

    def backward(self, outputs: None) -> None:
        pass

    inference = forward


@pytest.mark.parametrize("busy", [False, True])
def test_the_busy_clock_does_not_count_waiting(busy: bool) -> None:
    cpu = torch.device("cpu")
    times = timing.measure({"sleeps": _Sleeps()}, cpu, 5, 2e-3, 1.0, busy)["sleeps"]
    for which in ("forward", "inference", "both"):
        assert len(times.rounds[which]) == 5
        assert (times.quantiles(which)[1] < 1e-3) == busy
    assert times.quantiles("backward")[1] < 1e-3


class _Cached:
    """A pass that is slow whenever another one has run since."""

    last: _Cached | None = None

    def forward(self) -> None:
        if _Cached.last is not self:
            time.sleep(2e-3)
        _Cached.last = self

    def backward(self, outputs: None) -> None:
        pass

    inference = forward


def test_no_provider_pays_for_what_the_one_before_it_has_displaced() -> None:
    passes: dict[str, timing.Pass] = {"first": _Cached(), "second": _Cached()}
    for times in timing.measure(passes, torch.device("cpu"), 5, 1e-7, 1.0).values():
        assert len(times.rounds["forward"]) == 5
        assert times.quantiles("forward")[1] < 1e-3
