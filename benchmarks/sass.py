"""What the CUDA compiler made of the kernels, and how close to the memory roofline that can run.

    python benchmarks/sass.py                 # sm_80, 90, 100 and 120: two tables
    python benchmarks/sass.py --archs 90      # one architecture
    python benchmarks/sass.py --json

Needs nvcc and cuobjdump (triton's wheel has one), no GPU. The main loop of a kernel is its
largest loop that loads from global memory 16 bytes at a time; what it spends per element decides
what bounds the kernel. The prediction divides each chip's datasheet rates: bytes over bandwidth
against instructions over issue slots and over the slots of every pipe. It knows nothing of
latency, clocks under load or launch time: an upper bound, to be compared with `make gpu-check` on
a device.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script
from benchmarks import cubins

ARCHS = ("80", "90", "100", "120")
THREADS = 256


@dataclass(frozen=True)
class Chip:
    """Datasheet figures; the clock (GHz) is one that the chip holds under load, below its maximum.

    bandwidth: GB/s. fp32_lanes: per SM and cycle, of 128 issue slots.
    """

    name: str
    arch: str
    sms: int
    clock: float
    bandwidth: float
    fp32_lanes: int

    @property
    def slots_per_byte(self) -> float:
        """Issue slots (one instruction of one thread) in the time that one byte takes."""
        return self.sms * 128 * self.clock / self.bandwidth


CHIPS = (
    Chip("A100", "80", sms=108, clock=1.41, bandwidth=2039, fp32_lanes=64),
    Chip("H100", "90", sms=132, clock=1.70, bandwidth=3350, fp32_lanes=128),
    Chip("H200", "90", sms=132, clock=1.70, bandwidth=4800, fp32_lanes=128),
    Chip("B200", "100", sms=148, clock=1.85, bandwidth=8000, fp32_lanes=128),
)

# Lanes per SM and cycle beside 128 issue slots (CUDA programming guide, arithmetic throughput).
PIPE_LANES = {"fma": 128, "imad": 64, "alu": 64, "xu": 16, "lsu": 32, "fp64": 64}

_PIPES = (
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("xu", r"MUFU|I2F$|I2F\.|F2I|F2F|FRND"),
    ("lsu", r"LD|ST|ATOM|RED|SHFL|BAR|MEMBAR|CCTL|ERRBAR"),
    ("imad", r"IMAD"),
    ("fma", r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2"),
    ("control", r"BRA|EXIT|BSSY|BSYNC|WARPSYNC|CALL|RET|NOP|YIELD|JMP"),
    ("uniform", r"U[A-Z]|R2UR|S2UR"),
    ("alu", r""),
)


@functools.cache
def pipe(opcode: str) -> str:
    """The execution pipe of an instruction, by its name with modifiers."""
    if opcode.startswith(("IMAD.MOV", "IMAD.SHL", "IMAD.U32", "IMAD.IADD")):
        return "imad"
    return next(name for name, pattern in _PIPES if re.match(pattern, opcode))


@dataclass
class Loop:
    """One turn of a main loop, counted per thread."""

    opcodes: dict[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def accesses(self, kind: str) -> Counter[str]:
        """Global loads (``LDG``) or stores (``STG``) by width in bits."""
        widths: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            if opcode.startswith(kind):
                match = re.search(r"\.(64|128|256|U8|U16|S8|S16)\b", opcode)
                widths[match[1] if match else "32"] += count
        return widths

    def loaded_bytes(self) -> int:
        return sum(count * _bytes(width) for width, count in self.accesses("LDG").items())


def _bytes(width: str) -> int:
    return int(width.lstrip("US")) // 8


@dataclass
class Kernel:
    """One compiled entry point."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    spills: int  # loads from and stores to local memory, anywhere in the kernel
    instructions: int
    loop: Loop | None
    inputs: int = 0  # bytes that the main loop reads per element
    moved: int = 0  # and with what it writes
    per_element: dict[str, float] = field(default_factory=dict)

    @property
    def elements(self) -> float:
        """Elements of one turn of the main loop and thread."""
        assert self.loop is not None
        return self.loop.loaded_bytes() / self.inputs

    def cost(self) -> float:
        """Instructions per element in the main loop."""
        assert self.loop is not None
        return self.loop.instructions / self.elements

    def pipes(self) -> dict[str, float]:
        """Instructions per element by pipe."""
        assert self.loop is not None
        counts: Counter[str] = Counter()
        for opcode, count in self.loop.opcodes.items():
            counts[pipe(opcode)] += count
        return {name: count / self.elements for name, count in counts.items()}

    def _paired(self) -> float:
        """FFMA2 and its kind, per element."""
        assert self.loop is not None
        paired = (n for op, n in self.loop.opcodes.items() if re.match(r"F(FMA|MUL|ADD)2", op))
        return sum(paired) / self.elements

    def roofline(self, chip: Chip) -> tuple[float, str]:
        """The share of the bandwidth that the instructions leave reachable, and what bounds."""
        pipes = self.pipes()
        fma_lanes = chip.fp32_lanes
        slots = {"issue": self.cost()}
        for name, lanes in PIPE_LANES.items():
            lanes = fma_lanes if name == "fma" else lanes
            slots[name] = pipes.get(name, 0.0) * 128 / lanes
        # IMAD runs on half of the lanes that also do FFMA.
        slots["fma"] += pipes.get("imad", 0.0) * 128 / fma_lanes
        # One instruction for two numbers saves its issue slot, not the lanes' work.
        slots["fma"] += self._paired() * 128 / fma_lanes
        worst = max(slots, key=lambda name: slots[name])
        budget = chip.slots_per_byte * self.moved
        if slots[worst] <= budget:
            return 1.0, "memory"
        return budget / slots[worst], worst


# entry name pattern -> (bytes read, bytes moved) per element, in units of the dtype's size
TRAFFIC = {
    r"latent_forward_fast<(\w+), false>": (2, 3),
    r"latent_backward_fast<(\w+), false>": (3, 5),
    r"latent_forward_fast<(\w+), true>": (2, 3),
    r"latent_backward_fast<(\w+), true>": (3, 5),
    r"likelihood_forward<(\w+), false>": (2, 2),
    r"likelihood_forward<(\w+), true>": (3, 3),
    r"likelihood_backward<(\w+), false>": (2, 3),
    r"likelihood_backward<(\w+), true>": (3, 5),
}
SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}


def compile_kernels(archs: Sequence[str], files: Iterable[Path] | None = None) -> list[Kernel]:
    """All entry points of csrc/cuda (or of `files`) for each architecture."""
    jobs = [(file, arch) for file in (files or cubins.sources()) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: parse(*cubins.disassemble(*job), job[1]), jobs)
        return [kernel for kernels in found for kernel in kernels]


def parse(usage: str, sass: str, arch: str) -> list[Kernel]:
    """Kernels from what cuobjdump prints."""
    resources = {
        match[1]: {
            key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", match[2])
        }
        for match in re.finditer(r"Function (\S+):\s*\n\s*(REG:.*)", usage)
    }
    kernels = []
    for text in sass.split("Function : ")[1:]:
        mangled = text.split("\n", 1)[0].strip()
        code = [
            (int(address, 16), instruction)
            for address, instruction in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", text)
        ]
        opcodes = [_opcode(instruction) for _, instruction in code]
        use = resources[mangled]
        kernels.append(
            _with_traffic(
                Kernel(
                    name=readable(mangled),
                    arch=arch,
                    registers=use["REG"],
                    stack=use["STACK"],
                    shared=use["SHARED"],
                    spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
                    instructions=len(code),
                    loop=main_loop(code),
                )
            )
        )
    return kernels


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction.strip()).split()[0]


def main_loop(code: Sequence[tuple[int, str]]) -> Loop | None:
    """The largest loop without a barrier that loads 16 bytes at a time."""
    best: Loop | None = None
    for address, instruction in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if not jump or int(jump[1], 16) > address:
            continue
        body = Counter(_opcode(text) for at, text in code if int(jump[1], 16) <= at <= address)
        loop = Loop(dict(body))
        if any(opcode.startswith("BAR") for opcode in body) or not loop.accesses("LDG").get("128"):
            continue
        if best is None or loop.instructions > best.instructions:
            best = loop
    return best


def readable(mangled: str) -> str:
    """``latent_forward_fast<float, false>`` from the mangled name of an entry point."""
    match = re.search(
        r"\d+((?:latent|likelihood|elbo|fold|noise)_?\w*?)(I.*?EE?v|v|E?N|E)", mangled
    )
    name = re.search(r"\d+_GLOBAL__N_\S*?_cu_[0-9a-f]{8}(?:_\d+)?(\d+)([a-z_]+)", mangled)
    if name is None:
        return match[1] if match else mangled
    length = int(name[1]) if int(name[1]) <= len(name[2]) else int(name[1][-2:])
    base = name[2][:length]
    rest = mangled[name.start(2) + length :]
    types = {"f": "float", "d": "double"}
    arguments = []
    if rest.startswith("I"):
        wrapped = re.match(r"INS\d?_(?:3AnyI([fd])Lb([01])EE|(\d+)(B?Float16))E", rest)
        if wrapped and wrapped[1]:
            elements = ", elements" if wrapped[2] == "1" else ""
            arguments.append(f"Any<{types[wrapped[1]]}{elements}>")
        elif wrapped:
            arguments.append(wrapped[4])
        elif rest[1] in types:
            arguments.append(types[rest[1]])
        flags = rest[wrapped.end() :] if wrapped else rest
        arguments += [
            "true" if flag == "1" else "false" for flag in re.findall(r"Lb([01])E", flags)
        ]
    return f"{base}<{', '.join(arguments)}>" if arguments else base


def _with_traffic(kernel: Kernel) -> Kernel:
    for pattern, (read, moved) in TRAFFIC.items():
        match = re.fullmatch(pattern, kernel.name)
        if match and match[1] in SIZES:
            size = SIZES[match[1]]
            kernel.inputs, kernel.moved = read * size, moved * size
            if kernel.loop is not None:
                kernel.per_element = {"all": round(kernel.cost(), 2)}
                kernel.per_element |= {k: round(v, 2) for k, v in sorted(kernel.pipes().items())}
    return kernel


def report(kernels: Sequence[Kernel]) -> str:
    """Two tables in Markdown: what was compiled, and the predicted share of the roofline."""
    lines = [
        "| kernel | sm | registers | spills | shared | loads | stores | per element"
        " | fma | imad | alu | xu |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        if k.loop is None or not k.inputs:
            lines.append(f"| {k.name} | {k.arch} | {k.registers} | {k.spills} | {k.shared} |||||||")
            continue
        widths = [
            ", ".join(f"{count}x{width}" for width, count in k.loop.accesses(kind).items())
            for kind in ("LDG", "STG")
        ]
        pipes = k.pipes()
        figures = " | ".join(f"{pipes.get(name, 0):.1f}" for name in ("fma", "imad", "alu", "xu"))
        lines.append(
            f"| {k.name} | {k.arch} | {k.registers} | {k.spills} | {k.shared}"
            f" | {widths[0]} | {widths[1]} | {k.cost():.1f} | {figures} |"
        )
    lines += [
        "",
        "| kernel | bytes per element | " + " | ".join(chip.name for chip in CHIPS) + " |",
        "|---|---|" + "---|" * len(CHIPS),
    ]
    by_name: dict[str, dict[str, Kernel]] = {}
    for k in kernels:
        if k.loop is not None and k.inputs:
            by_name.setdefault(k.name, {})[k.arch] = k
    for name, per_arch in by_name.items():
        cells = []
        for chip in CHIPS:
            if chip.arch not in per_arch:
                cells.append("")
                continue
            share, bound = per_arch[chip.arch].roofline(chip)
            cells.append("memory" if bound == "memory" else f"{share:.0%} ({bound})")
        moved = next(iter(per_arch.values())).moved
        lines.append(f"| {name} | {moved} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Registers, access widths and instructions per element."
    )
    parser.add_argument(
        "--archs", default=",".join(ARCHS), help="comma-separated, of nvcc's sm_ numbers"
    )
    parser.add_argument("--json", action="store_true", help="everything, for another program")
    options = parser.parse_args(arguments)
    kernels = compile_kernels(options.archs.split(","))
    if options.json:
        print(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    else:
        print(report(kernels))


if __name__ == "__main__":
    main()
