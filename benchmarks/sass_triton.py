"""The Triton kernels beside the CUDA kernels: registers, instructions and bytes per element.

    python -m benchmarks.sass_triton              # sm_90
    python -m benchmarks.sass_triton --archs 80,90

What `benchmarks/sass.py` counts in the CUDA kernels is counted in what Triton compiles for the same
work. Needs triton, and nvcc for the CUDA column; no GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cubins, sass


@dataclass(frozen=True)
class Work:
    """The same work in both: the name of a Triton variant, its kernel, and the CUDA entry point.

    read, moved: tensors that the main loop reads, and reads and writes.
    """

    variant: str
    kernel: str
    cuda: str
    read: int
    moved: int


_FORWARD, _BACKWARD, _LIKELIHOOD = (
    "latent_forward_kernel",
    "latent_backward_kernel",
    "likelihood_kernel",
)
WORK = (
    Work("sample and KL, forward", _FORWARD, "latent_forward_fast<{}, false>", 2, 3),
    Work("sample and KL, backward", _BACKWARD, "latent_backward_fast<{}, false>", 3, 5),
    Work("likelihood, unit variance, forward", _LIKELIHOOD, "likelihood_forward<{}, false>", 2, 2),
    Work(
        "likelihood, unit variance, backward", _LIKELIHOOD, "likelihood_backward<{}, false>", 2, 3
    ),
    Work(
        "likelihood, variance per element, forward",
        _LIKELIHOOD,
        "likelihood_forward<{}, true>",
        3,
        3,
    ),
    Work(
        "likelihood, variance per element, backward",
        _LIKELIHOOD,
        "likelihood_backward<{}, true>",
        3,
        5,
    ),
)
CUDA_TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16"}


def triton_kernels(arch: str) -> Iterator[tuple[Work, str, sass.Kernel]]:
    """Work, dtype and what Triton compiled for it."""
    import torch

    from fused_elbo.triton import aot

    wanted = {(work.variant, work.kernel): work for work in WORK}
    for dtype in CUDA_TYPES:
        torch_dtype = getattr(torch, dtype)
        for name, launch in aot.launches(torch_dtype):
            work = wanted.get((name, launch.kernel.fn.__name__))
            if work is None:
                continue
            variant = aot.compile_variant(name, launch, torch_dtype, f"sm_{arch}")
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(variant.compiled.asm["cubin"])
                usage, code = cubins.dump(cubin)
            (kernel,) = sass.parse(usage, code, arch)
            kernel.inputs, kernel.moved = (
                n * torch_dtype.itemsize for n in (work.read, work.moved)
            )
            yield work, dtype, kernel


def report(archs: Sequence[str]) -> str:
    try:
        compiled = {(k.name, k.arch): k for k in sass.compile_kernels(archs)}
        without = ""
    except Exception as error:
        compiled, without = {}, f"No CUDA column: {str(error).splitlines()[0]}\n\n"
    lines = [
        "| work | dtype | sm | bytes | CUDA registers | per element"
        " | Triton registers | per element | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arch in archs:
        for work, dtype, kernel in triton_kernels(arch):
            cuda = compiled.get((work.cuda.format(CUDA_TYPES[dtype]), arch))
            beside = ("", "", "")
            if cuda is not None and cuda.loop is not None:
                beside = (
                    str(cuda.registers),
                    f"{cuda.cost():.1f}",
                    f"{kernel.cost() / cuda.cost():.2f}",
                )
            lines.append(
                f"| {work.variant} | {dtype} | {arch} | {kernel.moved} | {beside[0]} | {beside[1]}"
                f" | {kernel.registers} | {kernel.cost():.1f} | {beside[2]} |"
            )
    return without + "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Triton and CUDA kernels, instruction by instruction."
    )
    parser.add_argument("--archs", default="90", help="comma-separated, of nvcc's sm_ numbers")
    print(report(parser.parse_args(arguments).archs.split(",")))


if __name__ == "__main__":
    main()
