"""`DiagonalGaussian`: a posterior given by its moments, as latent-diffusion autoencoders produce
them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, backends, fastpath, ops
from .arguments import broadcast_prior, resolve_noise
from .functional import gaussian_log_likelihood
from .noise import NoiseKey
from .parametrization import (
    PLAIN,
    PLAIN_SCALE,
    Parametrization,
    parametrization,
    scale_params,
)
from .reference import accumulate_dtype, to_logvar
from .schemas import OFF, halves

__all__ = ["DiagonalGaussian"]

_DEFAULT_CLAMP = (-30.0, 20.0)
_UNBOUNDED = (-math.inf, math.inf)
_CLAMPED_LOGVAR = Parametrization(clamp=_DEFAULT_CLAMP)


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) over ``[B, *event]``.

    ``DiagonalGaussian(mean, logvar)`` takes two tensors of one shape. `from_moments` takes one
    tensor that holds both, reads it in place whatever its strides, and gives it one gradient,
    written once in its own layout. ``param`` says what is given in the place of logvar, as in
    `reparameterize_kl`; the properties ``logvar``, ``std`` and ``var`` are what it stands for.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    __slots__ = ("_chunk_dim", "_logvar", "_param", "_source")

    def __init__(
        self, mean: Tensor, logvar: Tensor, param: str | Parametrization = "logvar"
    ) -> None:
        mean = _checks.batched("DiagonalGaussian", "mean", mean)
        logvar = _checks.like("DiagonalGaussian", "logvar", logvar, "mean", mean)
        dtype = _checks.common_dtype(mean, logvar)
        self._source: Tensor = mean.to(dtype)
        self._logvar: Tensor | None = logvar.to(dtype)
        self._chunk_dim = -1
        self._param = parametrization("DiagonalGaussian", "param", param)

    @classmethod
    def from_moments(
        cls,
        moments: Tensor,
        dim: int = 1,
        clamp: tuple[float, float] | None = _DEFAULT_CLAMP,
        param: str | Parametrization = "logvar",
    ) -> DiagonalGaussian:
        """The Gaussian whose ``mean, logvar = moments.chunk(2, dim)``.

        Args:
            moments: ``[B, 2 * C, *rest]`` for ``dim=1``; contiguous, channels_last or any other
                layout.
            dim: the dimension that holds both halves; not the batch dimension.
            clamp: logvar is clamped to this range, with zero gradient outside, as `torch.clamp`
                does; None: no clamp. For logvar alone: another ``param`` brings its own clamp.
            param: what the second half holds.

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
        self = cls.__new__(cls)
        self._source, self._logvar, self._chunk_dim = moments, None, dim
        self._param = _moments_param(name, clamp, param)
        return self

    @property
    def mean(self) -> Tensor:
        return halves(self._source, self._logvar, self._chunk_dim)[0]

    @property
    def logvar(self) -> Tensor:
        parameter = halves(self._source, self._logvar, self._chunk_dim)[1]
        name, floor, clamp, soft = self._param
        if name == "logvar" and floor == 0 and not soft:
            return parameter if clamp is None else parameter.clamp(*clamp)
        wide = parameter.to(accumulate_dtype(parameter.dtype))
        return to_logvar(wide, scale_params(self._param, True)).to(parameter.dtype)

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
        mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """A reparameterized sample, ``[B, *event]`` or ``[K, B, *event]``; arguments as in
        `reparameterize`."""
        if (
            num_samples is None
            and key is None
            and generator is None
            and mask is None
            and backend is None
            and (done := self._fast(True, None)) is not None
        ):
            return done[0]
        name = "DiagonalGaussian.rsample"
        return self._run(name, None, num_samples, key, generator, True, OFF, backend, mask)[0]

    def sample_kl(
        self,
        num_samples: int | None = None,
        *,
        key: NoiseKey | None = None,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        reduction: str = "sample",
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(z, kl)`` against N(0, I) in one pass; arguments as in `reparameterize_kl`."""
        if (
            num_samples is None
            and key is None
            and generator is None
            and mask is None
            and backend is None
            and (done := self._fast(True, reduction)) is not None
        ):
            return done
        name = "DiagonalGaussian.sample_kl"
        code = _checks.reduction(name, reduction)
        return self._run(name, None, num_samples, key, generator, True, code, backend, mask)

    def kl(
        self,
        other: DiagonalGaussian | None = None,
        reduction: str = "sample",
        *,
        mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """KL(self || other) in nats, ``[B]``; other=None is N(0, I). Reductions as in
        `gaussian_kl`."""
        if (
            other is None
            and mask is None
            and backend is None
            and (done := self._fast(False, reduction)) is not None
        ):
            return done[1]
        name = "DiagonalGaussian.kl"
        if other is not None and not isinstance(other, DiagonalGaussian):
            raise TypeError(
                f"{name}: other must be a DiagonalGaussian or None, got {type(other).__name__}"
            )
        code = _checks.reduction(name, reduction)
        return self._run(name, other, None, None, None, False, code, backend, mask)[1]

    def log_prob(
        self,
        x: Tensor,
        reduction: str = "sample",
        *,
        mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """log density of ``x``, ``[B, *event]`` or ``[K, B, *event]``, in nats;
        `gaussian_log_likelihood`."""
        mean, parameter = halves(self._source, self._logvar, self._chunk_dim)
        return gaussian_log_likelihood(
            x, mean, parameter, param=self._param, mask=mask, reduction=reduction, backend=backend
        )

    def __repr__(self) -> str:
        mean = self.mean
        shape, dtype, device = tuple(mean.shape), mean.dtype, mean.device
        return f"DiagonalGaussian(shape={shape}, dtype={dtype}, device='{device}')"

    def _fast(self, want_z: bool, reduction: str | None) -> tuple[Tensor, Tensor] | None:
        """z and KL to N(0, I) by the fast path; None where this posterior or call is not for it."""
        name, floor, clamp, soft = self._param
        if name != "logvar" or floor or soft or torch.compiler.is_compiling():
            return None
        low, high = _UNBOUNDED if clamp is None else clamp
        return fastpath.posterior(
            self._source, self._logvar, self._chunk_dim, low, high, want_z, reduction
        )

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
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        source, logvar, chunk_dim = self._source, self._logvar, self._chunk_dim
        scale = scale_params(self._param, other is not None)
        prior_mean = prior_logvar = None
        if other is not None:
            if self._param == other._param:
                _, prior_logvar = halves(other._source, other._logvar, other._chunk_dim)
            else:  # each by its own parametrization, and the kernel by none
                prior_logvar = other.logvar
                scale = scale_params(self._param, False)
                if scale.code != PLAIN:
                    source, logvar, chunk_dim = self.mean, self.logvar, -1
                    scale = PLAIN_SCALE
            prior_mean, prior_logvar = broadcast_prior(name, other.mean, prior_logvar, self.mean)
            dtype = _checks.common_dtype(source, prior_mean)
            prior_mean, prior_logvar = prior_mean.to(dtype), prior_logvar.to(dtype)
            source, logvar = source.to(dtype), None if logvar is None else logvar.to(dtype)
        if mask is not None:
            mask = _checks.mask(name, mask, "mean", self.mean)
        kernels = backends.select(source.device.type, backend)
        samples = _checks.num_samples(name, num_samples)
        seed, seed_value, stream, row_offset = None, 0, 0, 0
        if want_z:
            seed, seed_value, stream, row_offset = resolve_noise(
                name, key, generator, source.device
            )
        params = ops.LatentParams(
            seed_value, stream, row_offset, samples, chunk_dim, *scale, want_z, reduction
        )
        return ops.latent(kernels, source, logvar, prior_mean, prior_logvar, seed, params, mask)


def _moments_param(
    function: str, clamp: tuple[float, float] | None, param: str | Parametrization
) -> Parametrization:
    """What the second half of moments holds, from both arguments that say so, checked."""
    if param == "logvar" and clamp == _DEFAULT_CLAMP:  # what nearly every call means
        return _CLAMPED_LOGVAR
    if clamp is not None and not clamp[0] <= clamp[1]:
        raise ValueError(f"{function}: clamp must be (low, high) with low <= high, got {clamp!r}")
    given = parametrization(function, "param", param)
    if param == "logvar":
        return Parametrization(clamp=clamp)
    if clamp is not None and clamp != _DEFAULT_CLAMP:
        raise ValueError(
            f"{function}: give the clamp of {given.name} in "
            f'param=Parametrization("{given.name}", clamp=...), not as clamp={clamp!r}'
        )
    return given
