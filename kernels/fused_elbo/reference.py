"""The mathematics in plain PyTorch: the truth that every kernel and every gradcheck is compared
with.

Differentiable, exact in float64, one formula per function, on any device. It is also the
`reference` backend and, being made of ordinary operations, what double backward and forward-mode
derivatives run on. Half-precision inputs are computed in float32, as in the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise import NoiseKey
from .parametrization import LOGSTD, PLAIN, PLAIN_SCALE, SOFT, SOFTPLUS_STD, VAR, ScaleParams

LOG_2PI = math.log(2.0 * math.pi)
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


# noise


def philox_words(
    key: NoiseKey, sample: int, first: int, count: int, device: torch.device | None = None
) -> Tensor:
    """The Philox4x32-10 output words of counters ``first .. first + count - 1``: int64 ``[count,
    4]``."""
    seed = (
        key.seed
        if isinstance(key.seed, Tensor)
        else torch.tensor(_as_int64(key.seed), device=device)
    )
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    counter = torch.arange(first, first + count, dtype=torch.int64, device=seed.device)
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.full_like(c0, sample), torch.full_like(c0, key.stream)
    for _ in range(10):
        # An int64 product keeps all 64 bits of a 32 x 32 product, whatever its sign bit says.
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK32, high0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=1)


def uniforms(words: Tensor, dtype: torch.dtype) -> Tensor:
    """u(w) = fma(w, 2**-32, 2**-33) in (0, 1], rounded twice in float32, exact in float64. Returned
    as float64."""
    w = words.double() if dtype == torch.float64 else words.float().double()
    u = w * 2.0**-32 + 2.0**-33  # exact: at most 34 significant bits
    return u if dtype == torch.float64 else u.float().double()


def normals(
    key: NoiseKey,
    shape: torch.Size,
    dtype: torch.dtype,
    num_samples: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Standard normals for ``[B, *event]``, or ``[K, B, *event]`` with ``num_samples=K``;
    Box-Muller in float64.

    Rounded to float32 unless ``dtype`` is float64.
    """
    event = math.prod(shape[1:])
    total = shape[0] * event
    start = key.row_offset * event
    offset = start % 4
    count = (offset + total + 3) // 4
    per_sample = []
    for k in range(max(num_samples, 1)):
        u = uniforms(philox_words(key, k, start // 4, count, device), dtype)
        radius, angle = u.reshape(count, 2, 2).unbind(2)
        radius, angle = torch.sqrt(-2.0 * torch.log(radius)), 2.0 * math.pi * angle
        pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2)
        per_sample.append(pairs.reshape(-1).narrow(0, offset, total).reshape(shape))
    eps = torch.stack(per_sample) if num_samples else per_sample[0]
    return eps.to(accumulate_dtype(dtype))


def fold_seed(seed: Tensor, data: int) -> Tensor:
    """What `NoiseKey.fold_in` does to a seed, on the seed's device."""
    golden = _as_int64(0x9E3779B97F4A7C15)
    return _mix(_mix(seed + golden) + _as_int64((data * golden) & ((1 << 64) - 1)))


def _mix(v: Tensor) -> Tensor:
    v = (v ^ _shift_right(v, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    v = (v ^ _shift_right(v, 27)) * _as_int64(0x94D049BB133111EB)
    return v ^ _shift_right(v, 31)


def _shift_right(v: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (v >> bits) & ((1 << (64 - bits)) - 1)


def _as_int64(v: int) -> int:
    v &= (1 << 64) - 1
    return v - (1 << 64) if v >= 1 << 63 else v


# formulas


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, sums and everything in nats: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def phi(x: Tensor) -> Tensor:
    """exp(x) - 1 - x without cancellation; never negative."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0.0)
    # sum of x**n / n! for n = 2..16: the first term left out is below 2**-53 of the sum for |x| <
    # 1/2
    series = torch.full_like(near, 1.0 / math.factorial(16))
    for n in range(15, 1, -1):
        series = series * near + 1.0 / math.factorial(n)
    far = torch.where(small, 1.0, x)
    direct = torch.expm1(far) - torch.where(far == math.inf, 0.0, far)
    return torch.where(small, series * near * near, direct)


def reduce(nats: Tensor, reduction: str, batch_dims: int = 1) -> Tensor:
    """none | sample (sum over events) | sum | batchmean (sum over events, mean over the batch)."""
    if reduction == "none":
        return nats
    if reduction == "sum":
        return nats.sum()
    per_sample = nats.flatten(batch_dims).sum(-1) if nats.dim() > batch_dims else nats
    return per_sample if reduction == "sample" else per_sample.mean()


def spread(grad: Tensor, shape: torch.Size, reduction: str, batch_dims: int = 1) -> Tensor:
    """The adjoint of `reduce`: an upstream gradient as a coefficient for every element of
    ``shape``."""
    if reduction == "sample":
        grad = grad.reshape(grad.shape + (1,) * (len(shape) - batch_dims))
    elif reduction == "batchmean":
        grad = grad / math.prod(shape[:batch_dims])
    return grad.expand(shape)


def scale_terms(parameter: Tensor, scale: ScaleParams) -> tuple[Tensor, Tensor]:
    """The log-variance that a parameter stands for, and its derivative by the parameter; both
    differentiable in turn."""
    code, floor, low, high = scale
    p, inner = parameter, torch.ones_like(parameter)
    if code & SOFT:
        middle, half = 0.5 * (low + high), 0.5 * (high - low)
        bent = torch.tanh((p - middle) / half)
        p, inner = middle + half * bent, 1.0 - bent.square()
    elif (low, high) != (-math.inf, math.inf):
        inner = ((p >= low) & (p <= high)).to(p.dtype)
        p = p.clamp(low, high)
    kind = code & ~SOFT
    if kind == VAR:
        # Below the floor the value is the floor's and the gradient passes.
        below = p < floor
        moving = torch.where(p.isfinite(), p, 0.0)
        var = torch.where(below, floor + (moving - moving.detach()), p)
        return torch.log(var), inner / var
    if kind == SOFTPLUS_STD:
        # Without a floor softplus becomes exp, and underflows where its logarithm does not.
        far = (p < -18.0) & (floor == 0)
        near, tail = torch.where(far, 0.0, p), torch.exp(torch.where(far, p, 0.0))
        std = torch.logaddexp(near, torch.zeros_like(near)) + floor
        log_std = torch.where(far, p - 0.5 * tail, torch.log(std))
        slope = torch.where(far, 1.0 - 0.5 * tail, torch.sigmoid(near) / std)
        return 2.0 * log_std, 2.0 * inner * slope
    factor = 2.0 if kind == LOGSTD else 1.0
    if floor == 0:
        return factor * p, factor * inner
    log_floor = torch.full_like(p, math.log(floor))
    return factor * torch.logaddexp(p, log_floor), factor * inner * torch.sigmoid(p - log_floor)


def to_logvar(parameter: Tensor, scale: ScaleParams) -> Tensor:
    """The log-variance that a parameter stands for."""
    return scale_terms(parameter, scale)[0]


def _prior_terms(
    prior_logvar: Tensor | None, scale: ScaleParams
) -> tuple[Tensor | None, Tensor | float]:
    """The same of a prior, which a plain scale leaves as it is."""
    if prior_logvar is None or scale.code == PLAIN:
        return prior_logvar, 1.0
    return scale_terms(prior_logvar, scale)


def _keep(t: Tensor | None, mask: Tensor | None, filler: float = 0.0) -> Tensor | None:
    """A tensor with a harmless number, whatever it holds, at the elements that do not count."""
    return t if t is None or mask is None else torch.where(mask, t, filler)


# 1 is a harmless parameter in every parametrization; 0 is not, as a variance.
_HARMLESS = 1.0


def sample_and_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    scale: ScaleParams,
    reduction: str | None,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """z = mean + exp(logvar / 2) eps and KL(q || p) = 1/2 [phi(logvar - prior_logvar) + (mean -
    prior_mean)^2 / var_p]; both 0 where the mask is False."""
    dtype = mean.dtype
    mean, prior_mean = _accumulate(_keep(mean, mask), _keep(prior_mean, mask))
    logvar, prior_logvar = _accumulate(
        _keep(logvar, mask, _HARMLESS), _keep(prior_logvar, mask, _HARMLESS)
    )
    logvar = to_logvar(logvar, scale)
    prior_logvar, _ = _prior_terms(prior_logvar, scale)
    z = kl = None
    if eps is not None:
        z = _keep(mean + torch.exp(0.5 * logvar) * eps, mask)
        z = z if z is None else z.to(dtype)
    if reduction is not None:
        if prior_mean is None or prior_logvar is None:
            nats = 0.5 * (mean.square() + phi(logvar))
        else:
            distance = (mean - prior_mean).square() * torch.exp(-prior_logvar)
            nats = 0.5 * (phi(logvar - prior_logvar) + distance)
        nats = nats if mask is None else torch.where(mask, nats, 0.0)
        kl = reduce(nats, reduction)
    return z, kl


def sample_and_kl_backward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    scale: ScaleParams,
    reduction: str | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `sample_and_kl`, written out; differentiable in turn."""
    dtype = mean.dtype
    mean, prior_mean, grad_z = _accumulate(
        _keep(mean, mask), _keep(prior_mean, mask), _keep(grad_z, mask)
    )
    logvar, prior_logvar = _accumulate(
        _keep(logvar, mask, _HARMLESS), _keep(prior_logvar, mask, _HARMLESS)
    )
    logvar, slope = scale_terms(logvar, scale)
    prior_logvar, prior_slope = _prior_terms(prior_logvar, scale)
    grad_mean, grad_logvar = torch.zeros_like(mean), torch.zeros_like(logvar)
    grad_prior_mean = grad_prior_logvar = None
    if prior_mean is not None:
        grad_prior_mean, grad_prior_logvar = torch.zeros_like(mean), torch.zeros_like(logvar)
    if grad_z is not None and eps is not None:
        grad_std = grad_z * eps
        if grad_z.dim() > mean.dim():
            grad_z, grad_std = grad_z.sum(0), grad_std.sum(0)
        grad_mean = grad_mean + grad_z
        grad_logvar = grad_logvar + 0.5 * torch.exp(0.5 * logvar) * grad_std
    if grad_kl is not None and reduction is not None:
        g = spread(grad_kl, mean.shape, reduction)
        g = g if mask is None else torch.where(mask, g, 0.0)
        if prior_mean is None or prior_logvar is None:
            grad_mean = grad_mean + g * mean
            grad_logvar = grad_logvar + 0.5 * g * torch.expm1(logvar)
        else:
            pull = (mean - prior_mean) * torch.exp(-prior_logvar)
            excess = torch.expm1(logvar - prior_logvar)
            grad_mean = grad_mean + g * pull
            grad_logvar = grad_logvar + 0.5 * g * excess
            grad_prior_mean = -g * pull
            grad_prior_logvar = -0.5 * g * prior_slope * (excess + (mean - prior_mean) * pull)
    # A slope of 0 means no gradient, also of what is infinite.
    grad_logvar = torch.where(slope == 0, 0.0, grad_logvar * slope)
    grads = (grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar)
    kept = (_keep(g, mask) for g in grads)
    return tuple(None if g is None else g.to(dtype) for g in kept)  # type: ignore[return-value]


def log_likelihood(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float,
    batch_dims: int,
    reduction: str,
    scale: ScaleParams = PLAIN_SCALE,
    mask: Tensor | None = None,
) -> Tensor:
    """log N(x; mean, exp(logvar)) = -1/2 [(x - mean)^2 exp(-logvar) + logvar + ln 2 pi]; 0 where
    the mask is False."""
    residual, logvar, inverse, _ = _residual(x, mean, logvar, scale, mask)
    nats = -0.5 * (residual.square() * inverse + logvar + LOG_2PI)
    return reduce(nats if mask is None else torch.where(mask, nats, 0.0), reduction, batch_dims)


def log_likelihood_backward(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float,
    batch_dims: int,
    reduction: str,
    grad: Tensor,
    scale: ScaleParams = PLAIN_SCALE,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `log_likelihood` for mean (minus that for x) and logvar; differentiable in
    turn."""
    residual, _, inverse, slope = _residual(x, mean, logvar, scale, mask)
    g = spread(grad, x.shape, reduction, batch_dims)
    g = g if mask is None else torch.where(mask, g, 0.0)
    grad_mean = g * residual * inverse
    grad_logvar = 0.5 * g * (residual.square() * inverse - 1.0)
    if isinstance(slope, Tensor):
        grad_logvar = torch.where(slope == 0, 0.0, grad_logvar * slope)
    if isinstance(logvar, Tensor):
        grad_logvar = grad_logvar.sum_to_size(logvar.shape).to(logvar.dtype)
    return grad_mean.to(mean.dtype), grad_logvar


def elbo(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | float,
    mean: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss = -(log-likelihood - beta KL), and its two parts per sample."""
    ll = log_likelihood(x, recon_x, recon_logvar, 1, "sample")
    if kl is None:
        assert mean is not None and logvar is not None
        _, kl = sample_and_kl(mean, logvar, None, None, None, PLAIN_SCALE, "sample")
        assert kl is not None
    return reduce(beta * kl - ll, reduction), ll, kl


def _accumulate(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(t if t is None else t.to(accumulate_dtype(t.dtype)) for t in tensors)  # type: ignore[misc]


def _residual(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float,
    scale: ScaleParams,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor | float]:
    """x - mean, the log-variance, its negative exponential, and its derivative by the parameter."""
    x, mean = _accumulate(_keep(x, mask), _keep(mean, mask))
    if not isinstance(logvar, Tensor):
        precision = torch.exp(torch.tensor(-logvar, dtype=x.dtype, device=x.device))
        return x - mean, logvar, precision, 1.0
    slope: Tensor | float = 1.0
    logvar = logvar.to(x.dtype)
    if mask is not None:
        logvar = torch.where(mask, logvar, _HARMLESS)
    if scale.code != PLAIN:
        logvar, slope = scale_terms(logvar, scale)
    return x - mean, logvar, torch.exp(-logvar), slope
