"""`python -m fused_elbo.profile`: one workload, run as a profiler wants it, and how to profile it.

    python -m fused_elbo.profile                         what there is to run
    python -m fused_elbo.profile latent                  run it; print the nsys and ncu commands
    python -m fused_elbo.profile --capture run.jsonl     what FUSED_ELBO_CAPTURE=run.jsonl recorded
    python -m fused_elbo.profile elbo --trace out.json   a Chrome trace, on any machine

Warm-up comes first; what follows lies between cudaProfilerStart and cudaProfilerStop and in the
NVTX range ``profile``, with a range around every operation.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import backends, capture, instrument, tracing
from .functional import gaussian_log_likelihood, reparameterize_kl
from .gaussian import DiagonalGaussian
from .loss import elbo_loss

# What tells of a kernel bound by memory: its time, its bytes, its share of the device's bandwidth;
# then what keeps it from more: busy issue slots, the width of its accesses, its occupancy, spills.
NCU_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "smsp__sass_inst_executed_op_local.sum",
)

DTYPES = ("float32", "float64", "bfloat16", "float16")

Step = Callable[[], None]


def workloads(
    dtype: torch.dtype, device: str, backend: str | None
) -> dict[str, tuple[str, Callable[[], Step]]]:
    """name -> what it is, and what prepares one forward and backward pass of it."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(0.5).to(dtype).requires_grad_()

    def data(*shape: int) -> Tensor:
        return leaf(*shape).detach()

    def latent(*shape: int, prior: bool = False, samples: int | None = None) -> Step:
        parameters = [leaf(*shape) for _ in range(4 if prior else 2)]
        grad_z = data(*(() if samples is None else (samples,)), *shape)

        def step() -> None:
            z, kl = reparameterize_kl(*parameters, num_samples=samples, backend=backend)
            torch.autograd.backward((z, kl), (grad_z, torch.ones_like(kl)))

        return step

    def moments(*shape: int) -> Step:
        parameters = leaf(*shape)
        grad_z = data(shape[0], shape[1] // 2, *shape[2:])

        def step() -> None:
            z, kl = DiagonalGaussian.from_moments(parameters).sample_kl(backend=backend)
            torch.autograd.backward((z, kl), (grad_z, torch.ones_like(kl)))

        return step

    def likelihood(*shape: int, full: bool = False) -> Step:
        x, mean, logvar = data(*shape), leaf(*shape), leaf(*shape) if full else None

        def step() -> None:
            gaussian_log_likelihood(x, mean, logvar, backend=backend).sum().backward()

        return step

    def elbo(image: tuple[int, ...], code: tuple[int, ...]) -> Step:
        recon, x, mean, logvar = leaf(*image), data(*image), leaf(*code), leaf(*code)

        def step() -> None:
            elbo_loss(recon, x, mean, logvar, backend=backend).loss.backward()

        return step

    image, code = (16, 3, 256, 256), (16, 4, 32, 32)
    return {
        "latent": ("reparameterize_kl [1024, 128]", lambda: latent(1024, 128)),
        "latent-large": ("reparameterize_kl [64, 16384]", lambda: latent(64, 16384)),
        "latent-prior": (
            "reparameterize_kl [16, 16, 32, 32], q || p",
            lambda: latent(16, 16, 32, 32, prior=True),
        ),
        "latent-samples": (
            "reparameterize_kl [128, 32], K = 50",
            lambda: latent(128, 32, samples=50),
        ),
        "moments": (
            "DiagonalGaussian.from_moments [16, 8, 64, 64]",
            lambda: moments(16, 8, 64, 64),
        ),
        "likelihood": (
            "gaussian_log_likelihood [16, 3, 256, 256]",
            lambda: likelihood(*image),
        ),
        "likelihood-full": (
            "the same, a variance per pixel",
            lambda: likelihood(*image, full=True),
        ),
        "elbo": (
            "elbo_loss [16, 3, 256, 256], latent [16, 4, 32, 32]",
            lambda: elbo(image, code),
        ),
    }


def captured(path: str, device: str | None, backend: str | None) -> Step:
    """Every distinct call of a capture file, once each; forward and backward are separate calls."""
    calls = []
    for op, recorded_backend, arguments, _ in capture.load(path):
        tensors = [capture.rebuild(a, device) for a in arguments]
        chosen = backend or (None if device else recorded_backend)
        kernels = backends.select(tensors[0].device.type, chosen)
        calls.append((getattr(instrument.instrument(kernels), op), tensors))
    if not calls:
        raise ValueError(f"{path} holds no calls")

    def step() -> None:
        with torch.no_grad():
            for operation, tensors in calls:
                operation(*tensors)

    return step


def profiler_commands(arguments: list[str], cuda: bool) -> str:
    """The exact command lines for Nsight Systems and Nsight Compute."""
    run = f"{shlex.quote(sys.executable)} -m fused_elbo.profile {shlex.join(arguments)}"
    if not cuda:
        return (
            "Nsight Systems, the ranges on a timeline (no GPU here, so nothing for ncu):\n"
            "  nsys profile --trace=nvtx,osrt --sample=none --cpuctxsw=none \\\n"
            "    --capture-range=nvtx --nvtx-capture=profile@fused_elbo \\\n"
            "    --capture-range-end=stop \\\n"
            f"    -o fused_elbo {run}\n"
            "  nsys stats --report nvtx_sum fused_elbo.nsys-rep"
        )
    return (
        "Nsight Systems, kernels and ranges on a timeline:\n"
        "  nsys profile --trace=cuda,nvtx \\\n"
        "    --capture-range=cudaProfilerApi --capture-range-end=stop \\\n"
        f"    -o fused_elbo {run}\n"
        "  nsys stats --report nvtx_kern_sum,cuda_gpu_kern_sum fused_elbo.nsys-rep\n"
        "Nsight Compute, the counters of each kernel (--set full: everything):\n"
        "  ncu --profile-from-start off --nvtx \\\n"
        '    --nvtx-include "regex:fused_elbo@.*_(forward|backward).*/" \\\n'
        f"    --launch-count 10 --metrics {','.join(NCU_METRICS)} \\\n    -o fused_elbo {run}"
    )


def run(step: Step, iterations: int, warmup: int, cuda: bool) -> float:
    """Seconds for one call of ``step``, ranges on, between the marks that profilers wait for."""
    with tracing.enable():
        for _ in range(warmup):
            step()
        with _profiled(cuda), tracing.range("profile"):
            start = time.perf_counter()
            for _ in range(iterations):
                step()
            if cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / iterations


@contextlib.contextmanager
def _profiled(cuda: bool) -> Iterator[None]:
    if not cuda:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def write_trace(step: Step, path: str, iterations: int, cuda: bool) -> str:
    """Writes a Chrome trace (ui.perfetto.dev, chrome://tracing); returns a table of operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tracing.enable():
        step()
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(iterations):
                step()
            if cuda:
                torch.cuda.synchronize()
    profiler.export_chrome_trace(path)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m fused_elbo.profile", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("workload", nargs="?", help="its name; none: list them")
    parser.add_argument("--capture", metavar="FILE", help="what FUSED_ELBO_CAPTURE=FILE wrote")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--backend", help="default: as for any call on that device")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16")
    )
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace of three iterations")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"

    if options.capture:
        # A recorded call runs on its own device and backend unless told otherwise.
        on = options.device or (None if torch.cuda.is_available() else "cpu")
        step, title = captured(options.capture, on, options.backend), options.capture
    else:
        known = workloads(getattr(torch, options.dtype), device, options.backend)
        if options.workload not in known:
            if options.workload:
                parser.error(f"no workload {options.workload!r}: it is one of {', '.join(known)}")
            print("\n".join(f"{name:<18}{what}" for name, (what, _) in known.items()))
            return 0
        title, prepare = known[options.workload]
        step = prepare()

    print(f"{title}, {device}, {backends.explain(torch.empty(0, device=device))}")
    if options.trace:
        print(write_trace(step, options.trace, 3, cuda))
        size = Path(options.trace).stat().st_size
        print(f"{options.trace}: {size:,} bytes; open it in ui.perfetto.dev or chrome://tracing")
        return 0
    seconds = run(step, options.iterations, options.warmup, cuda)
    print(f"{1e6 * seconds:,.1f} us for one forward and backward pass, with the ranges on\n")
    print(profiler_commands(arguments, cuda))
    return 0


if __name__ == "__main__":
    sys.exit(main())
