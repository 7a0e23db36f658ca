"""Compiles what a model will need before it is needed, so that the first training step is not slow.

    python -m fused_elbo.triton.warmup --device cuda:0 --shapes 64x4x32x32 16x3x256x256 --dtypes
    float32 bfloat16

or, in the process that will train (which then starts with the kernels in memory), `warm_up`.

What decides whether a kernel must be compiled: the operation and its optional arguments, the dtype,
the strides' pattern (dense, channels_last, expanded), whether 16-byte accesses are possible, the
kind of scale parametrization and whether it has a floor or a clamp, whether there is a mask, and
for rows of up to 1024 elements the next power of two of their length (of longer rows, that of the
number of their parts, for a tiny kernel that adds them up). Not the batch size, or the values of
any argument.

docs/triton.md says what Triton keeps where: in short, in memory, and under ``TRITON_CACHE_DIR``
(default ``~/.triton/cache``), from where another process loads a kernel in milliseconds. Compiling
one takes 0.3 to 2 s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parametrization import (
    PLAIN_SCALE,
    Parametrization,
    ScaleParams,
    parametrization,
    scale_params,
)
from ..schemas import BATCHMEAN, OFF, SAMPLE
from . import interpreting, reason

OPERATIONS = (
    "reparameterize_kl",
    "reparameterize",
    "gaussian_kl",
    "from_moments",
    "gaussian_log_likelihood",
    "elbo_loss",
)
_MOMENTS_SCALE = ScaleParams(clamp_min=-30.0, clamp_max=20.0)


def warm_up(
    shapes: Iterable[Sequence[int]],
    *,
    device: torch.device | str = "cuda",
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    operations: Iterable[str] = OPERATIONS,
    priors: bool = False,
    channels_last: bool = False,
    param: str | Parametrization = "logvar",
    mask_dims: Sequence[int] | None = None,
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
        param: of the posterior and the prior, and of a decoder's variance per element.
        mask_dims: with a mask that varies over these dimensions and is one value over the others:
            ``(0, -1)`` for ``[B, 1, T]``. None: without a mask.

    Returns:
        The names of the kernels, in the order in which they were compiled or found in the cache.

    Raises:
        TypeError, ValueError: an unknown operation, a shape without a batch dimension, a param or
            mask_dims that do not fit.
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
        for launch in required(shapes, dtypes, operations, priors, channels_last, param, mask_dims):
            launch.kernel.warmup(grid=(launch.programs,), **launch.args, **options)
            compiled.append(launch.kernel.fn.__name__)
    return compiled


def required(
    shapes: Iterable[Sequence[int]],
    dtypes: Iterable[torch.dtype],
    operations: Iterable[str] = OPERATIONS,
    priors: bool = False,
    channels_last: bool = False,
    param: str | Parametrization = "logvar",
    mask_dims: Sequence[int] | None = None,
) -> list[Any]:
    """The launches, on tensors without storage, whose kernels `warm_up` compiles."""
    from .launch import add_all, recording

    operations = tuple(operations)
    if unknown := set(operations) - set(OPERATIONS):
        known = ", ".join(OPERATIONS)
        raise ValueError(f"warm_up: unknown operations {sorted(unknown)}, expected some of {known}")
    checked = parametrization("warm_up", "param", param)
    dtypes = tuple(dtypes)
    with recording() as launches:
        for shape in map(tuple, shapes):
            if not shape:
                raise ValueError("warm_up: a shape needs at least the batch dimension")
            if not all(-len(shape) <= dim < len(shape) for dim in mask_dims or ()):
                raise ValueError(
                    f"warm_up: mask_dims must be dimensions of the shape {shape}, "
                    f"got {tuple(mask_dims or ())}"
                )
            for dtype in dtypes:
                model = _Model(dtype, channels_last, checked, priors, mask_dims)
                for operation in operations:
                    model.record(operation, shape)
        for dtype in {_nats(dtype) for dtype in dtypes}:
            parts = torch.empty(2, dtype=dtype, device="meta")
            add_all(parts, parts.new_empty(()))  # a sum over a batch larger than those of `shapes`
    return launches


def _nats(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Model(NamedTuple):
    """How the tensors of a model look, but for their shapes."""

    dtype: torch.dtype
    channels_last: bool
    param: Parametrization
    priors: bool
    mask_dims: Sequence[int] | None

    def record(self, operation: str, shape: tuple[int, ...]) -> None:
        if operation == "gaussian_log_likelihood":
            self._likelihood(shape)
        elif operation == "elbo_loss":
            self._elbo(shape)
        elif operation == "from_moments":
            if len(shape) > 1 and shape[1] % 2 == 0:
                half = (shape[0], shape[1] // 2, *shape[2:])
                self._latent(half, None, self._tensor(*shape), SAMPLE, True)
        else:
            reduction = OFF if operation == "reparameterize" else SAMPLE
            prior = self._tensor(*shape) if self.priors else None
            self._latent(shape, prior, None, reduction, operation != "gaussian_kl")

    def _tensor(self, *shape: int, kind: torch.dtype | None = None) -> Tensor:
        t = torch.empty(shape, dtype=kind or self.dtype, device="meta")
        wanted = self.channels_last and len(shape) == 4
        return t.to(memory_format=torch.channels_last) if wanted else t

    def _nats(self, *shape: int) -> Tensor:
        return self._tensor(*shape, kind=_nats(self.dtype))

    def _mask(self, shape: tuple[int, ...]) -> Tensor | None:
        if self.mask_dims is None:
            return None
        kept = {dim % len(shape) for dim in self.mask_dims}
        sizes = [size if dim in kept else 1 for dim, size in enumerate(shape)]
        return torch.empty(sizes, dtype=torch.bool, device="meta").expand(shape)

    def _variances(self, shape: tuple[int, ...]) -> list[tuple[Tensor | None, ScaleParams]]:
        """Those of a decoder, and what a kernel converts: another than plain logvar has one for
        each element."""
        each = scale_params(self.param, with_prior=True)
        if self.param == Parametrization():
            each = PLAIN_SCALE
        return [
            (None, PLAIN_SCALE),
            (self._tensor(), PLAIN_SCALE),
            (self._tensor(*shape), each),
        ]

    def _likelihood(self, shape: tuple[int, ...]) -> None:
        from .likelihood_operations import likelihood_backward, likelihood_forward

        tensor, mask, grad = self._tensor(*shape), self._mask(shape), self._nats(shape[0])
        for logvar, scale in self._variances(shape):
            params = (mask, 0.0, 1, SAMPLE, *scale)
            likelihood_forward(tensor, tensor, logvar, *params)
            likelihood_backward(tensor, tensor, logvar, grad, True, logvar is not None, *params)

    def _elbo(self, shape: tuple[int, ...]) -> None:
        from .elbo_operations import elbo_forward

        tensor, mask, kl = self._tensor(*shape), self._mask(shape), self._nats(shape[0])
        for logvar, scale in self._variances(shape):
            for want_grads in (False, True):
                given = (tensor, tensor, logvar, 0.0, None, None, kl, None, 1.0, BATCHMEAN)
                elbo_forward(*given, want_grads, mask, *scale)

    def _latent(
        self,
        shape: tuple[int, ...],
        prior: Tensor | None,
        moments: Tensor | None,
        reduction: int,
        sampled: bool,
    ) -> None:
        from .latent_operations import latent_backward, latent_forward

        scale, chunk = scale_params(self.param, prior is not None), -1
        z = self._tensor(*shape)
        inputs: tuple[Any, ...] = (z, z, prior, prior)
        if moments is not None:
            inputs, chunk = (moments, None, None, None), 1
            scale = _MOMENTS_SCALE if self.param == Parametrization() else scale
        seed = self._tensor(kind=torch.int64) if sampled else None
        params = (seed, self._mask(shape), 0, 0, 0, 0, chunk, *scale)
        forward: Callable[..., Any] = latent_forward
        backward: Callable[..., Any] = latent_backward
        forward(*inputs, *params, sampled, reduction)
        grad_kl = None if reduction == OFF else self._nats(shape[0])
        grad_z = z if sampled else None
        backward(*inputs, grad_z, grad_kl, *params, reduction, prior is not None)


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
    parser.add_argument(
        "--param",
        default="logvar",
        choices=["logvar", "logstd", "softplus_std", "var"],
        help="what scale parameters stand for (with a floor or clamp: warm_up)",
    )
    parser.add_argument(
        "--mask-dims",
        nargs="+",
        type=int,
        metavar="DIM",
        help="with a mask that varies over these dimensions: 0 -1 for [B, 1, T]",
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
            param=options.param,
            mask_dims=options.mask_dims,
        )
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")
    seconds = time.perf_counter() - started
    print(f"{len(compiled)} kernels ready in {seconds:.1f} s: {', '.join(sorted(set(compiled)))}")


if __name__ == "__main__":
    main()
