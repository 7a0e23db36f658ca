"""What nvcc makes of the training kernels, held to the bounds of the design. Skipped where there
is no nvcc."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("sass")  # what its fixtures make is made once

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import sass  # noqa: E402
from build_support.nvcc import find_nvcc  # noqa: E402

# Instructions per element in the main loop on sm_90, without a clamp.
BOUNDS = {
    "latent_forward_fast<float, false>": 58,
    "latent_backward_fast<float, false>": 56,
    "latent_forward_fast<BFloat16, false>": 58,
    "latent_backward_fast<BFloat16, false>": 58,
    "latent_forward_fast<Float16, false>": 58,
    "latent_backward_fast<Float16, false>": 58,
}
# And on sm_100, where one instruction serves a pair of float32.
PAIRED_BOUNDS = {
    "latent_forward_fast<float, false>": 40,
    "latent_backward_fast<float, false>": 39,
    "latent_forward_fast<BFloat16, false>": 41,
    "latent_backward_fast<BFloat16, false>": 43,
}


@pytest.fixture(scope="module")
def kernels() -> Sequence[sass.Kernel]:
    try:
        find_nvcc()
    except Exception as error:
        pytest.skip(f"needs nvcc: {error}")
    return sass.compile_kernels(["90"])


@pytest.fixture(scope="module")
def latent_kernels(kernels: Sequence[sass.Kernel]) -> Sequence[sass.Kernel]:
    """Those with the most to keep in registers, for every architecture that the tables show."""
    names = ("latent_forward", "latent_backward", "elbo_kernel")
    files = [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in names]
    return [*kernels, *sass.compile_kernels(["80", "100", "120"], files)]


def fast(kernels: Sequence[sass.Kernel]) -> list[sass.Kernel]:
    found = [kernel for kernel in kernels if "_fast<" in kernel.name]
    assert len(found) == 12
    return found


def test_main_loops_keep_to_their_instruction_bounds(kernels: Sequence[sass.Kernel]) -> None:
    costs = {kernel.name: kernel.cost() for kernel in fast(kernels)}
    assert {name: costs[name] for name in BOUNDS if costs[name] > BOUNDS[name]} == {}


def test_pairs_cost_one_instruction_where_the_machine_has_it(
    latent_kernels: Sequence[sass.Kernel],
) -> None:
    costs = {k.name: k.cost() for k in latent_kernels if k.arch == "100" and k.inputs}
    assert {n: costs[n] for n in PAIRED_BOUNDS if costs[n] > PAIRED_BOUNDS[n]} == {}


def test_training_kernels_use_at_most_64_registers(kernels: Sequence[sass.Kernel]) -> None:
    assert {k.name: k.registers for k in fast(kernels) if k.registers > 64} == {}


def test_no_kernel_spills_a_register(latent_kernels: Sequence[sass.Kernel]) -> None:
    assert {f"{k.name} on sm_{k.arch}": k.spills for k in latent_kernels if k.spills} == {}


def test_main_loops_move_16_bytes_per_access(kernels: Sequence[sass.Kernel]) -> None:
    measured = [kernel for kernel in kernels if kernel.inputs]
    assert len(measured) == 12 + 16
    for kernel in measured:
        assert kernel.loop is not None, kernel.name
        assert set(kernel.loop.accesses("LDG")) == {"128"}, kernel.name


def test_training_loops_store_16_bytes_per_access(kernels: Sequence[sass.Kernel]) -> None:
    for kernel in fast(kernels):
        assert kernel.loop is not None
        assert set(kernel.loop.accesses("STG")) == {"128"}, kernel.name
        assert kernel.elements == 8, kernel.name


def test_float32_is_memory_bound_on_every_chip(latent_kernels: Sequence[sass.Kernel]) -> None:
    checked = 0
    for chip in sass.CHIPS:
        for kernel in latent_kernels:
            if kernel.arch == chip.arch and "_fast<float, false>" in kernel.name:
                assert kernel.roofline(chip) == (1.0, "memory"), (kernel.name, chip.name)
                checked += 1
    assert checked == 2 * len(sass.CHIPS)


def test_the_main_loop_is_found_among_other_loops() -> None:
    code = [
        (0x00, "MOV R1, R2"),
        (0x10, "LDG.E.128 R4, desc[UR4][R2.64]"),
        (0x20, "FFMA R4, R4, R5, R6"),
        (0x30, "@P0 BRA 0x10"),
        (0x40, "LDG.E R4, desc[UR4][R2.64]"),
        (0x50, "FADD R4, R4, R5"),
        (0x60, "FADD R4, R4, R5"),
        (0x70, "@P0 BRA 0x40"),
    ]
    loop = sass.main_loop(code)
    assert loop is not None
    assert loop.opcodes == {"LDG.E.128": 1, "FFMA": 1, "BRA": 1}
    assert loop.loaded_bytes() == 16
    assert json.loads(json.dumps(asdict(loop))) == {"opcodes": loop.opcodes}
