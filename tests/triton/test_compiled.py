"""Every kernel variant, compiled for every target, and what the assembler made of it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from fused_elbo.triton import aot, geometry
from fused_elbo.triton.aot import Variant

from . import disassembly

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NVIDIA = tuple(target for target in aot.TARGETS if target.startswith("sm_"))
AMD = tuple(target for target in aot.TARGETS if target.startswith("gfx"))


def together(targets: tuple[str, ...]) -> list[object]:
    """A target's tests go to one worker, which takes its code apart once."""
    return [pytest.param(target, marks=pytest.mark.xdist_group(target)) for target in targets]


on_sm_90 = pytest.mark.xdist_group("sm_90")


# Shared memory: four warps' sums in the second stage of `tl.sum`, or a tile on its way between two
# layouts.
SHARED_SUMS, SHARED_TILE = 512, geometry.TILE * 8


#: What is compiled for a target: everything for sm_90, and elsewhere what shows whether its
#: assembler spills or narrows. FUSED_ELBO_TEST_EVERY_VARIANT=1 compiles everything for all.
FURTHER = {"sm_80": ("common", "policies"), "sm_90": aot.CALLS, "gfx942": ("common", "policies")}


def compiled_for(target: str, dtype: torch.dtype) -> Iterator[Variant]:
    every = os.environ.get("FUSED_ELBO_TEST_EVERY_VARIANT") == "1"
    kinds = aot.CALLS if every else FURTHER.get(target, ("common",))
    return aot.compile_variants(target, (dtype,), kinds)


def compile_all(target: str, dtype: torch.dtype) -> int:
    return sum(1 for _ in compiled_for(target, dtype))


@pytest.fixture(scope="module", autouse=True)
def compiled_side_by_side() -> None:
    """Every core compiles into Triton's cache, from which `variants` then reads."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    cores = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, cores), mp_context=spawn) as pool:
        work = [pool.submit(compile_all, t, dtype) for dtype in DTYPES for t in aot.TARGETS]
        assert min(job.result() for job in work) >= 10


@functools.cache
def variants(target: str, dtype: torch.dtype) -> tuple[Variant, ...]:
    return tuple(compiled_for(target, dtype))


def find(target: str, dtype: torch.dtype, kernel: str, name: str) -> Variant:
    (found,) = [v for v in variants(target, dtype) if (v.kernel, v.name) == (kernel, name)]
    return found


def is_element_by_element(variant: Variant) -> bool:
    """Layouts in which neighbors in the noise's order are not neighbors in memory."""
    return "channels last" in variant.name


def test_every_kernel_is_among_the_variants() -> None:
    kernels = {launch.kernel.fn.__name__ for _, launch in aot.launches(torch.float32)}
    assert kernels == {
        "latent_forward_kernel",
        "latent_backward_kernel",
        "likelihood_kernel",
        "elbo_kernel",
        "elbo_finish_kernel",
        "add_rows_kernel",
        "add_blocks_kernel",
        "fold_seed_kernel",
        "noise_words_kernel",
    }


#: In float64 the assembler for sm_80 leaves one number on the stack in these, with registers to
#: spare; float64 is there for exactness and not for speed.
ON_THE_STACK = {
    ("sm_80", torch.float64, "sample and KL, prior, forward"): 8,
    ("sm_80", torch.float64, "elbo, unit variance, with gradients"): 8,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", together(NVIDIA))
def test_nvidia_variants_neither_spill_nor_exceed_their_shared_memory(
    target: str, dtype: torch.dtype
) -> None:
    for variant in variants(target, dtype):
        code = disassembly.nvidia(variant)
        assert code.local == 0, variant.name
        stack = ON_THE_STACK.get((target, dtype, variant.name), 0)
        assert code.stack <= stack, (variant.name, code.stack)
        # Sixteen warps at a time; twelve where every element has an address of its own; in float64
        # eight with a prior, twelve with a loop of samples.
        limit = 168 if is_element_by_element(variant) else 128
        if dtype == torch.float64 and re.search("prior|samples", variant.name):
            limit = 192 if "prior" in variant.name else 168
        assert code.registers <= limit, (variant.name, code.registers)
        assert variant.compiled.metadata.shared <= SHARED_TILE, variant.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", together(NVIDIA))
def test_every_access_of_an_aligned_main_loop_is_128_bits_wide(
    target: str, dtype: torch.dtype
) -> None:
    checked = 0
    for variant in variants(target, dtype):
        if variant.aligned and not is_element_by_element(variant):
            accesses = disassembly.nvidia(variant).accesses()
            assert accesses, variant.name
            narrow = [access for access in accesses if ".128" not in access]
            groups = variant.elements // variant.threads // geometry.lanes(dtype)
            # A mask has a byte for each element of a group, read at once.
            mask = [f"LDG.E{'.64' if dtype.itemsize == 2 else ''}"] * groups
            assert narrow == (mask if "mask" in variant.name else []), (variant.name, accesses)
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("target", together(NVIDIA))
def test_normals_are_made_where_they_are_used(target: str, dtype: torch.dtype) -> None:
    """No layout conversion through shared memory, and few enough registers for 1024 threads per
    multiprocessor.
    """
    for name in ("sample and KL, forward", "sample and KL, backward"):
        (variant,) = [
            v for v in variants(target, dtype) if v.name == name and v.kernel.startswith("latent")
        ]
        code = disassembly.nvidia(variant)
        assert not code.uses_shared_memory()
        assert variant.compiled.metadata.shared <= SHARED_SUMS
        assert code.registers <= 64


#: Instructions per element in the main loop on sm_90. DESIGN section 7 asks for 68 at most for
#: float32 forward and for Triton within 1.25 of the CUDA kernels (60 and 57 in float32, 62 and 60
#: in bfloat16; 7 and 30 for the likelihood, 25 for its gradients with a variance per element in
#: half precision).
BUDGETS = [
    (torch.float32, "latent_forward_kernel", "sample and KL, forward", 66),
    (torch.float32, "latent_backward_kernel", "sample and KL, backward", 67),
    (torch.bfloat16, "latent_forward_kernel", "sample and KL, forward", 66),
    (torch.bfloat16, "latent_backward_kernel", "sample and KL, backward", 68),
    (torch.float16, "latent_forward_kernel", "sample and KL, forward", 66),
    (torch.float16, "latent_backward_kernel", "sample and KL, backward", 68),
    (torch.float32, "latent_forward_kernel", "sample and KL, small rows, forward", 66),
    (torch.float32, "latent_forward_kernel", "sample and KL, prior, forward", 106),
    (torch.float32, "latent_backward_kernel", "sample and KL, prior, backward", 111),
    (torch.float32, "latent_forward_kernel", "samples and KL, forward", 68),
    (torch.float32, "likelihood_kernel", "likelihood, unit variance, forward", 6.5),
    (torch.float32, "likelihood_kernel", "likelihood, unit variance, backward", 8),
    (torch.float32, "likelihood_kernel", "likelihood, variance per element, forward", 26),
    (torch.float32, "likelihood_kernel", "likelihood, variance per element, backward", 28),
    (torch.bfloat16, "likelihood_kernel", "likelihood, variance per element, backward", 30),
    (torch.float16, "likelihood_kernel", "likelihood, variance per element, backward", 30),
    # Parametrizations: what a logarithm, an exponential and a division rounded to nearest cost.
    (torch.float32, "latent_forward_kernel", "sample and KL, variance, forward", 90),
    (torch.float32, "latent_forward_kernel", "sample and KL, floored logvar, forward", 106),
    (torch.float32, "latent_forward_kernel", "sample and KL, softplus std, forward", 127),
    (torch.float32, "latent_backward_kernel", "sample and KL, softplus std, backward", 159),
    (torch.float32, "likelihood_kernel", "likelihood, softplus std, forward", 88),
    (torch.float32, "latent_forward_kernel", "sample and KL, mask, forward", 71),
    (torch.float32, "latent_backward_kernel", "sample and KL, mask, backward", 72),
    (torch.bfloat16, "latent_forward_kernel", "sample and KL, mask, forward", 73),
]  # fmt: skip


@on_sm_90
@pytest.mark.parametrize(("dtype", "kernel", "name", "budget"), BUDGETS)
def test_instructions_per_element_on_sm_90(
    dtype: torch.dtype, kernel: str, name: str, budget: float
) -> None:
    variant = find("sm_90", dtype, kernel, name)
    per_element = len(disassembly.nvidia(variant).loop) * variant.threads / variant.elements
    assert budget / 3 < per_element <= budget


@pytest.mark.parametrize("target", together(("sm_80", "sm_90")))
def test_the_square_root_is_the_only_approximate_instruction(target: str) -> None:
    """The bound on the normals allows for it (`interpreted/test_words.py`); any other would have to
    be allowed for too. float64 has none.
    """
    for dtype in DTYPES:
        for variant in variants(target, dtype):
            ptx = variant.compiled.asm["ptx"]
            found = set(re.findall(r"^\s+(?:@\S+ )?(\S*\.(?:approx|full|ftz)\S*)", ptx, re.M))
            allowed = set() if dtype == torch.float64 else {"sqrt.approx.ftz.f32"}
            assert found <= allowed, (variant.name, found)


@on_sm_90
def test_philox_takes_one_wide_multiplication_per_product() -> None:
    variant = find("sm_90", torch.float32, "latent_forward_kernel", "sample, forward")
    loop = disassembly.nvidia(variant).loop
    counters = variant.elements // variant.threads // 4
    wide = sum(disassembly.opcode(line).startswith("IMAD.WIDE.U32") for line in loop)
    # Twenty products per counter; that of sample and stream is the same everywhere and leaves the
    # loop.
    assert 19 * counters <= wide <= 20 * counters


@on_sm_90
def test_the_compiler_may_not_fuse_what_is_not_written_fused() -> None:
    for variant in variants("sm_90", torch.float32):
        assert variant.compiled.metadata.enable_fp_fusion is False


@on_sm_90
def test_sums_are_added_in_one_layout_whatever_the_alignment() -> None:
    """The bits of a row's KL must not depend on where the row lies in memory; the order of `tl.sum`
    is its layout's.
    """

    def summed_layouts(name: str) -> set[str]:
        module = find("sm_90", torch.float32, "latent_forward_kernel", name).compiled.asm["ttgir"]
        names = dict(re.findall(r"^(#\w+) = (.*)$", module, re.M))
        reduced = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<[^,]*, (#\w+)>', module, re.S)
        return {names[layout] for layout in reduced}

    aligned = summed_layouts("sample and KL, forward")
    assert len(aligned) == 1
    assert summed_layouts("sample and KL, misaligned, forward") == aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", together(AMD))
def test_amd_variants_use_no_scratch_and_wide_accesses(target: str, dtype: torch.dtype) -> None:
    for variant in variants(target, dtype):
        counts = disassembly.amd(variant)
        assert counts["vgpr_spill_count"] == counts["private_segment_fixed_size"] == 0, variant.name
        # Four waves per SIMD; in float64 three, or two with a prior or a loop of samples.
        limit = 128
        if dtype == torch.float64:
            limit = 256 if re.search("prior|samples", variant.name) else 168
        assert counts["vgpr_count"] <= limit, (variant.name, counts["vgpr_count"])
        assert variant.compiled.metadata.shared <= SHARED_TILE, variant.name
        if variant.aligned and not is_element_by_element(variant):
            assert counts["wide_accesses"] >= 2, variant.name
