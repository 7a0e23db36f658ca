"""`DiagonalGaussian`: a posterior given by its moments, as latent-diffusion autoencoders produce
them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, backends, ops
from .functional import broadcast_prior, gaussian_log_likelihood, resolve_noise
from .noise import NoiseKey
from .schemas import OFF, halves

__all__ = ["DiagonalGaussian"]

_NO_CLAMP = (-math.inf, math.inf)


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) over ``[B, *event]``.

    ``DiagonalGaussian(mean, logvar)`` takes two tensors of one shape. `from_moments` takes one
    tensor that holds both, reads it in place whatever its strides, and gives it one gradient,
    written once in its own layout.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    __slots__ = ("_chunk_dim", "_clamp", "_logvar", "_source")

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        mean = _checks.batched("DiagonalGaussian", "mean", mean)
        logvar = _checks.like("DiagonalGaussian", "logvar", logvar, "mean", mean)
        dtype = _checks.common_dtype(mean, logvar)
        self._source: Tensor = mean.to(dtype)
        self._logvar: Tensor | None = logvar.to(dtype)
        self._chunk_dim = -1
        self._clamp: tuple[float, float] = _NO_CLAMP

    @classmethod
    def from_moments(
        cls, moments: Tensor, dim: int = 1, clamp: tuple[float, float] | None = (-30.0, 20.0)
    ) -> DiagonalGaussian:
        """The Gaussian whose ``mean, logvar = moments.chunk(2, dim)``.

        Args:
            moments: ``[B, 2 * C, *rest]`` for ``dim=1``; contiguous, channels_last or any other
                layout.
            dim: the dimension that holds both halves; not the batch dimension.
            clamp: logvar is clamped to this range, with zero gradient outside, as `torch.clamp`
                does; None: no clamp.

        Raises:
            TypeError, ValueError: not a floating-point tensor, an odd size, a dim out of range, an
                empty clamp range.

        Equivalent to::

            mean, logvar = moments.chunk(2, dim)
            logvar = logvar.clamp(-30.0, 20.0)
        """
        name = "DiagonalGaussian.from_moments"
        moments = _checks.batched(name, "moments", moments)
        if (
            not isinstance(dim, int)
            or not -moments.dim() <= dim < moments.dim()
            or dim % moments.dim() == 0
        ):
            raise ValueError(
                f"{name}: dim must be a dimension of moments {tuple(moments.shape)} "
                f"other than the batch, got {dim!r}"
            )
        dim %= moments.dim()
        if moments.shape[dim] % 2:
            raise ValueError(
                f"{name}: moments must have an even size in dimension {dim}, "
                f"got {tuple(moments.shape)}"
            )
        if clamp is not None and not clamp[0] <= clamp[1]:
            raise ValueError(f"{name}: clamp must be (low, high) with low <= high, got {clamp!r}")
        self = cls.__new__(cls)
        self._source, self._logvar, self._chunk_dim = moments, None, dim
        self._clamp = _NO_CLAMP if clamp is None else (float(clamp[0]), float(clamp[1]))
        return self

    @property
    def mean(self) -> Tensor:
        return halves(self._source, self._logvar, self._chunk_dim)[0]

    @property
    def logvar(self) -> Tensor:
        logvar = halves(self._source, self._logvar, self._chunk_dim)[1]
        return logvar if self._clamp == _NO_CLAMP else logvar.clamp(*self._clamp)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def rsample(
        self,
        num_samples: int | None = None,
        *,
        key: NoiseKey | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """A reparameterized sample, ``[B, *event]`` or ``[K, B, *event]``; arguments as in
        `reparameterize`."""
        return self._run(
            "DiagonalGaussian.rsample", None, num_samples, key, generator, True, OFF, backend
        )[0]

    def sample_kl(
        self,
        num_samples: int | None = None,
        *,
        key: NoiseKey | None = None,
        generator: torch.Generator | None = None,
        reduction: str = "sample",
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(z, kl)`` against N(0, I) in one pass; arguments as in `reparameterize_kl`."""
        name = "DiagonalGaussian.sample_kl"
        code = _checks.reduction(name, reduction)
        return self._run(name, None, num_samples, key, generator, True, code, backend)

    def kl(
        self,
        other: DiagonalGaussian | None = None,
        reduction: str = "sample",
        *,
        backend: str | None = None,
    ) -> Tensor:
        """KL(self || other) in nats, ``[B]``; other=None is N(0, I). Reductions as in
        `gaussian_kl`."""
        name = "DiagonalGaussian.kl"
        if other is not None and not isinstance(other, DiagonalGaussian):
            raise TypeError(
                f"{name}: other must be a DiagonalGaussian or None, got {type(other).__name__}"
            )
        code = _checks.reduction(name, reduction)
        return self._run(name, other, None, None, None, False, code, backend)[1]

    def log_prob(
        self, x: Tensor, reduction: str = "sample", *, backend: str | None = None
    ) -> Tensor:
        """log density of ``x``, ``[B, *event]`` or ``[K, B, *event]``, in nats;
        `gaussian_log_likelihood`."""
        return gaussian_log_likelihood(
            x, self.mean, self.logvar, reduction=reduction, backend=backend
        )

    def __repr__(self) -> str:
        mean = self.mean
        shape, dtype, device = tuple(mean.shape), mean.dtype, mean.device
        return f"DiagonalGaussian(shape={shape}, dtype={dtype}, device='{device}')"

    def _run(
        self,
        name: str,
        other: DiagonalGaussian | None,
        num_samples: int | None,
        key: NoiseKey | None,
        generator: torch.Generator | None,
        want_z: bool,
        reduction: int,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        source, logvar = self._source, self._logvar
        prior_mean = prior_logvar = None
        if other is not None:
            prior_mean, prior_logvar = broadcast_prior(name, other.mean, other.logvar, self.mean)
            dtype = _checks.common_dtype(source, prior_mean)
            prior_mean, prior_logvar = prior_mean.to(dtype), prior_logvar.to(dtype)
            source, logvar = source.to(dtype), None if logvar is None else logvar.to(dtype)
        kernels = backends.select(source.device.type, backend)
        samples = _checks.num_samples(name, num_samples)
        seed, seed_value, stream, row_offset = None, 0, 0, 0
        if want_z:
            seed, seed_value, stream, row_offset = resolve_noise(
                name, key, generator, source.device
            )
        params = ops.LatentParams(
            seed_value,
            stream,
            row_offset,
            samples,
            self._chunk_dim,
            *self._clamp,
            want_z,
            reduction,
        )
        return ops.latent(kernels, source, logvar, prior_mean, prior_logvar, seed, params)
