"""What the assembler made of a kernel: resources, instructions, and the loop that does the work."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

from fused_elbo.triton.aot import Variant

_BIN = (
    Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
)  # Triton brings NVIDIA's tools along


class Disassembly(NamedTuple):
    registers: int
    stack: int
    local: int
    loops: list[list[str]]  # instructions of every loop that reads or writes global memory

    @property
    def loop(self) -> list[str]:
        """The main loop: the longest."""
        return max(self.loops, key=len, default=[])

    def accesses(self) -> list[str]:
        """Global loads and stores of the loops, without predicates and operands."""
        names = (opcode(line) for loop in self.loops for line in loop)
        return [name for name in names if name.startswith(("LDG", "STG"))]

    def uses_shared_memory(self) -> bool:
        names = (opcode(line) for loop in self.loops for line in loop)
        return any(name.startswith(("LDS", "STS")) for name in names)


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [_BIN / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


@functools.cache
def nvidia(variant: Variant) -> Disassembly:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(variant.compiled.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", resources)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(match[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], end) < end:
            loops.append(instructions[labels[target[1]] : end + 1])
    with_memory = [
        loop for loop in loops if any(opcode(line).startswith(("LDG", "STG")) for line in loop)
    ]
    return Disassembly(registers, stack, local, with_memory)


def amd(variant: Variant) -> dict[str, int]:
    """The counts that the assembler notes: registers, spills, scratch and shared (LDS) bytes."""
    text = variant.compiled.asm["amdgcn"]
    keys = (
        "vgpr_count",
        "vgpr_spill_count",
        "sgpr_spill_count",
        "private_segment_fixed_size",
        "group_segment_fixed_size",
    )
    counts = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in keys}
    counts["wide_accesses"] = len(
        re.findall(r"(?:global|buffer|flat)_(?:load|store)_dwordx4", text)
    )
    return counts
