"""Compiles what a model will need before it is needed, so that the first training step is not slow.

    python -m fused_elbo.triton.warmup --device cuda:0 --shapes 64x4x32x32 16x3x256x256 --dtypes
    float32 bfloat16

or, in the process that will train (which then starts with the kernels in memory), `warm_up`.

What decides whether a kernel must be compiled: the operation and its optional arguments, the dtype,
the strides' pattern (dense, channels_last, expanded), whether 16-byte accesses are possible, and
for rows of up to 1024 elements the next power of two of their length (of longer rows, that of the
number of their parts, for a tiny kernel that adds them up). Not the batch size, or the values of
any argument.

docs/triton.md says what Triton keeps where: in short, in memory, and under ``TRITON_CACHE_DIR``
(default ``~/.triton/cache``), from where another process loads a kernel in milliseconds. Compiling
one takes 0.3 to 2 s.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import interpreting, reason

OPERATIONS = (
    "reparameterize_kl",
    "reparameterize",
    "gaussian_kl",
    "from_moments",
    "gaussian_log_likelihood",
    "elbo_loss",
)
_FREE, _CLAMP = (-math.inf, math.inf), (-30.0, 20.0)


def warm_up(
    shapes: Iterable[Sequence[int]],
    *,
    device: torch.device | str = "cuda",
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    operations: Iterable[str] = OPERATIONS,
    priors: bool = False,
    channels_last: bool = False,
) -> list[str]:
    """Compiles forward and backward of operations on tensors of some shapes; runs nothing and
    allocates nothing.

    Args:
        shapes: shapes ``[B, *event]`` of latents and reconstructions; of the moments (mean and
            logvar together, in dimension 1) for ``from_moments``. ``B`` does not matter.
        device: the GPU to compile for.
        dtypes: of the tensors.
        operations: some of `OPERATIONS`.
        priors: with a learned prior of the latent's shape.
        channels_last: 4-dim tensors in that memory format.

    Returns:
        The names of the kernels, in the order in which they were compiled or found in the cache.

    Raises:
        ValueError: an unknown operation, or a shape without a batch dimension.
        RuntimeError: Triton cannot compile for a device here; says why.
    """
    if (why := reason()) is not None:
        raise RuntimeError(f"fused_elbo.triton.warm_up: {why}")
    if interpreting():
        raise RuntimeError(
            "fused_elbo.triton.warm_up: the interpreter (TRITON_INTERPRET=1) compiles nothing"
        )
    from .launch import device_options

    compiled = []
    with torch.cuda.device(torch.device(device)):
        options = device_options(torch.device("cuda", torch.cuda.current_device()))
        for launch in required(shapes, dtypes, operations, priors, channels_last):
            launch.kernel.warmup(grid=(launch.programs,), **launch.args, **options)
            compiled.append(launch.kernel.fn.__name__)
    return compiled


def required(
    shapes: Iterable[Sequence[int]],
    dtypes: Iterable[torch.dtype],
    operations: Iterable[str] = OPERATIONS,
    priors: bool = False,
    channels_last: bool = False,
) -> list[Any]:
    """The launches, on tensors without storage, whose kernels `warm_up` compiles."""
    from .launch import add_all, recording

    operations = tuple(operations)
    if unknown := set(operations) - set(OPERATIONS):
        known = ", ".join(OPERATIONS)
        raise ValueError(f"warm_up: unknown operations {sorted(unknown)}, expected some of {known}")
    dtypes = tuple(dtypes)
    with recording() as launches:
        for shape in shapes:
            if not shape:
                raise ValueError("warm_up: a shape needs at least the batch dimension")
            for dtype in dtypes:
                for operation in operations:
                    _record(operation, tuple(shape), dtype, priors, channels_last)
        for dtype in {_nats(dtype) for dtype in dtypes}:
            parts = torch.empty(2, dtype=dtype, device="meta")
            add_all(parts, parts.new_empty(()))  # a sum over a batch larger than those of `shapes`
    return launches


def _nats(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _record(
    operation: str, shape: tuple[int, ...], dtype: torch.dtype, priors: bool, channels_last: bool
) -> None:
    from ..schemas import BATCHMEAN, OFF, SAMPLE
    from . import latent_operations, likelihood_operations

    def meta(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        t = torch.empty(sizes, dtype=kind, device="meta")
        return t.to(memory_format=torch.channels_last) if channels_last and len(sizes) == 4 else t

    nats = _nats(dtype)
    seed = meta(kind=torch.int64)
    tensor = meta(*shape)
    if operation == "gaussian_log_likelihood":
        for logvar, value in ((None, 0.0), (meta(), 0.0), (tensor, 0.0)):
            likelihood_operations.likelihood_forward(tensor, tensor, logvar, value, 1, SAMPLE)
            likelihood_operations.likelihood_backward(
                tensor,
                tensor,
                logvar,
                value,
                1,
                SAMPLE,
                meta(shape[0], kind=nats),
                True,
                logvar is not None,
            )
    elif operation == "elbo_loss":
        for logvar in (None, meta()):
            for want_grads in (False, True):
                given = meta(shape[0], kind=nats)
                likelihood_operations.elbo_forward(
                    tensor, tensor, logvar, 0.0, None, None, given, None, 1.0, BATCHMEAN, want_grads
                )
    elif operation == "from_moments":
        if len(shape) > 1 and shape[1] % 2 == 0:
            half = meta(shape[0], shape[1] // 2, *shape[2:])
            _record_latent(
                latent_operations,
                (tensor, None, None, None),
                half,
                seed,
                nats,
                1,
                _CLAMP,
                SAMPLE,
                True,
            )
    else:
        prior = tensor if priors else None
        reduction = OFF if operation == "reparameterize" else SAMPLE
        inputs = (tensor, tensor, prior, prior)
        sampled = operation != "gaussian_kl"
        _record_latent(latent_operations, inputs, tensor, seed, nats, -1, _FREE, reduction, sampled)


def _record_latent(
    operations: Any,
    inputs: tuple[Tensor | None, ...],
    like_z: Tensor,
    seed: Tensor,
    nats: torch.dtype,
    chunk: int,
    clamp: tuple[float, float],
    reduction: int,
    sampled: bool,
) -> None:
    forward: Callable[..., Any] = operations.latent_forward
    backward: Callable[..., Any] = operations.latent_backward
    forward(*inputs, seed, 0, 0, 0, 0, chunk, *clamp, sampled, reduction)
    grad_kl = torch.empty(like_z.shape[0], dtype=nats, device="meta") if reduction >= 0 else None
    grad_z = like_z if sampled else None
    backward(
        *inputs, grad_z, grad_kl, seed, 0, 0, 0, 0, chunk, *clamp, reduction, inputs[2] is not None
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes like 64x4x32x32, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fused_elbo.triton.warmup", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", nargs="+", type=_shape, required=True, metavar="BxCxHxW")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        choices=["float32", "float64", "bfloat16", "float16"],
    )
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--priors", action="store_true", help="with a learned prior")
    parser.add_argument(
        "--channels-last", action="store_true", help="4-dim tensors in channels_last"
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        compiled = warm_up(
            options.shapes,
            device=options.device,
            dtypes=[getattr(torch, name) for name in options.dtypes],
            operations=options.operations,
            priors=options.priors,
            channels_last=options.channels_last,
        )
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")
    seconds = time.perf_counter() - started
    print(f"{len(compiled)} kernels ready in {seconds:.1f} s: {', '.join(sorted(set(compiled)))}")


if __name__ == "__main__":
    main()
