"""What `gpu_check.py` runs on the device, a process each: `python -m benchmarks.gpu_parts graphs`.

graphs      captures a training step in a CUDA graph: every replay draws fresh noise, with a fixed
            key every replay gives the bits of the eager call
exercise    every kernel on small tensors, vector and ragged, for compute-sanitizer
roofline    bytes per second of the training kernels beside a device-to-device copy, as JSON
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import fused_elbo
from fused_elbo import NoiseKey, elbo_loss, gaussian_log_likelihood, reparameterize_kl

DEVICE = "cuda"


@dataclass(frozen=True)
class Speed:
    """One kernel's compulsory bytes over its time, and its share of what a copy reaches."""

    kernel: str
    gb_per_s: float
    share: float


def training_step(mean: Tensor, logvar: Tensor, x: Tensor, key: NoiseKey | None) -> list[Tensor]:
    """z, the loss and the gradients of one step through every kernel of a VAE."""
    z, kl = reparameterize_kl(mean, logvar, key=key)
    out = elbo_loss(z, x, kl=kl)
    return [z, out.loss, *torch.autograd.grad(out.loss, (mean, logvar))]


def graphs() -> str:
    shape = (64, 4096)
    mean, logvar = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    x = torch.randn(shape, device=DEVICE)
    fixed = NoiseKey(torch.tensor(7, device=DEVICE))
    for key in (None, fixed):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            training_step(mean, logvar, x, key)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = training_step(mean, logvar, x, key)
        replays = []
        for _ in range(3):
            graph.replay()
            replays.append([tensor.detach().clone() for tensor in captured])
        torch.cuda.synchronize()
        _check_replays(replays, fresh=key is None)
        if key is not None:
            eager = training_step(mean, logvar, x, key)
            names = ("z", "loss", "gradient by mean", "gradient by logvar")
            for name, a, b in zip(names, replays[0], eager):
                if not torch.equal(a, b):
                    raise AssertionError(f"{name} of a replay differs from the eager call")
    return "3 replays each: fresh noise without a key, with a key the bits of the eager call"


def _check_replays(replays: list[list[Tensor]], fresh: bool) -> None:
    for before, after in zip(replays, replays[1:]):
        same = float((before[0] == after[0]).double().mean())
        if fresh and same > 0.001:
            raise AssertionError(f"{same:.1%} of z repeat from one replay to the next")
        if not fresh and not all(torch.equal(a, b) for a, b in zip(before, after)):
            raise AssertionError("the same key gave other bits in a second replay")


def exercise() -> str:
    """Small, because compute-sanitizer slows a kernel down up to a hundredfold."""
    calls = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        reductions = ("sample", "none", "batchmean") if dtype == torch.float32 else ("sample",)
        for shape in ((3, 8), (5, 33), (2, 4100), (1, 40_000), (700, 8)):
            for offset in (0, 1):
                mean, logvar, x = (_operand(shape, dtype, offset) for _ in range(3))
                for reduction in reductions:
                    z, kl = reparameterize_kl(mean, logvar, key=NoiseKey(1), reduction=reduction)
                    ll = gaussian_log_likelihood(x, z, logvar, reduction=reduction)
                    torch.autograd.grad(kl.sum() - ll.sum(), (mean, logvar))
                    calls += 2
                out = elbo_loss(x, mean, mean, logvar, recon_logvar=logvar)
                torch.autograd.grad(out.loss, (mean, logvar))
                calls += 1
                for param, mask in (("softplus_std", None), ("logvar", x > 0)):
                    z, kl = reparameterize_kl(mean, logvar, key=NoiseKey(1), param=param, mask=mask)
                    ll = gaussian_log_likelihood(x, z, logvar, param=param, mask=mask)
                    torch.autograd.grad(kl.sum() - ll.sum(), (mean, logvar))
                    calls += 2
    torch.cuda.synchronize()
    return f"{calls} calls"


def _operand(shape: tuple[int, int], dtype: torch.dtype, offset: int) -> Tensor:
    count = shape[0] * shape[1]
    flat = torch.randn(count + offset, device=DEVICE).to(dtype)
    return flat[offset:].view(shape).requires_grad_()


def seconds(run: Callable[[], object], rounds: int = 30) -> float:
    """Median of CUDA-event times, after a warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def roofline() -> str:
    """64M elements: far beyond the last-level cache, and launches cost nothing beside it."""
    rows, event = 64, 1 << 20
    copy = _copy_bytes_per_second(rows * event)
    speeds = [
        Speed(kernel, moved / taken / 1e9, moved / taken / copy)
        for kernel, moved, taken in _measured(rows, event)
    ]
    return json.dumps({"copy_gb_per_s": copy / 1e9, "kernels": [asdict(s) for s in speeds]})


def _copy_bytes_per_second(elements: int) -> float:
    source = torch.randn(elements, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))


def _measured(rows: int, event: int) -> Iterator[tuple[str, int, float]]:
    """Kernel, bytes that it must move, seconds."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for kernel, tensors, run in _kernels(rows, event, dtype):
            yield f"{kernel} {name}", tensors * rows * event * dtype.itemsize, seconds(run)


def _kernels(
    rows: int, event: int, dtype: torch.dtype
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Kernel, tensors of full size that it reads or writes, a call of it."""
    key = NoiseKey(torch.tensor(3, device=DEVICE))
    mean, logvar, grad_z = (torch.randn(rows, event, device=DEVICE).to(dtype) for _ in range(3))
    yield "latent forward", 3, lambda: reparameterize_kl(mean, logvar, key=key)
    yield "log-likelihood forward", 2, lambda: gaussian_log_likelihood(mean, logvar)
    leaves = (mean.requires_grad_(), logvar.requires_grad_())
    z, kl = reparameterize_kl(*leaves, key=key)
    upstream = (grad_z, torch.ones_like(kl))
    yield (
        "latent backward",
        5,
        lambda: torch.autograd.grad((z, kl), leaves, upstream, retain_graph=True),
    )


PARTS: dict[str, Callable[[], str]] = {
    "graphs": graphs,
    "exercise": exercise,
    "roofline": roofline,
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        raise SystemExit(f"gpu_parts: expected one of {', '.join(PARTS)}, got {sys.argv[1:]}")
    with fused_elbo.use_backend("cuda"):
        print(PARTS[sys.argv[1]]())


if __name__ == "__main__":
    main()
