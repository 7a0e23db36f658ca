"""What tests/bench/nvtx_log.c has written, as trees of ranges."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass
class Range:
    domain: str
    payload: int
    message: str
    children: list[Range] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.message.split(" ", 1)[0]

    def walk(self) -> list[Range]:
        return [self, *(r for child in self.children for r in child.walk())]


def build_tool(folder: Path) -> Path:
    """Compiles the NVTX tool."""
    library = folder / "nvtx_log.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", str(HERE / "nvtx_log.c"), "-o", str(library)]
    subprocess.run([*command, "-lpthread"], check=True)
    return library


def run_under_tool(tool: Path, log: Path, script: str, **environment: str) -> str:
    """Runs Python code in a process that the tool observes, tracing on; returns what it prints."""
    variables = {
        **os.environ,
        "NVTX_INJECTION64_PATH": str(tool),
        "NVTX_LOG": str(log),
        "FUSED_ELBO_NVTX": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("kernels", "vae", ".")),
        **environment,
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(log: Path) -> dict[str, list[Range]]:
    """Thread -> its outermost ranges. Raises where a pop has no push, or a push no pop."""
    roots: dict[str, list[Range]] = {}
    stacks: dict[str, list[Range]] = {}
    for line in log.read_text().splitlines():
        kind, thread, domain, *rest = line.split("\t")
        stack = stacks.setdefault(thread, [])
        if kind == "push":
            entry = Range(domain, int(rest[0]), rest[1])
            (stack[-1].children if stack else roots.setdefault(thread, [])).append(entry)
            stack.append(entry)
        else:
            assert stack, f"thread {thread} pops a range of {domain!r} that it has not pushed"
            assert stack.pop().domain == domain
    left = {thread: [r.message for r in stack] for thread, stack in stacks.items() if stack}
    assert not left, f"never popped: {left}"
    return roots
