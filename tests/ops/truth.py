"""The truth, written a second time: the noise contract in NumPy, the formulas in float64, phi in 50
digits.

Nothing here is shared with the package, so that one mistake cannot hide in both.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import torch
from torch import Tensor

LOW = np.uint64(0xFFFFFFFF)


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011): uint32 words ``[n, 4]`` of counters ``[n, 4]``."""
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ k0,
            p1 & LOW,
            (p0 >> np.uint64(32)) ^ c[3] ^ k1,
            p0 & LOW,
        ]
        k0 = (k0 + np.uint64(0x9E3779B9)) & LOW
        k1 = (k1 + np.uint64(0xBB67AE85)) & LOW
    return np.stack(c, axis=1).astype(np.uint32)


def words(seed: int, first: int, count: int, sample: int = 0, stream: int = 0) -> np.ndarray:
    """The words of counters ``first .. first + count - 1`` as the noise contract places them."""
    positions = (
        [first + i for i in range(count)]
        if first + count > 1 << 62
        else np.arange(first, first + count)
    )
    positions = np.array(positions, dtype=np.uint64)
    counters = np.empty((count, 4), dtype=np.uint64)
    counters[:, 0], counters[:, 1] = positions & LOW, positions >> np.uint64(32)
    counters[:, 2], counters[:, 3] = sample, stream
    seed &= (1 << 64) - 1
    return philox(counters, (seed & 0xFFFFFFFF, seed >> 32))


def normals(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    row_offset: int = 0,
    num_samples: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The contract's normals for ``[B, *event]``, evaluated in float64 whatever the dtype."""
    event = math.prod(shape[1:])
    total = shape[0] * event
    start = row_offset * event
    first, lane = divmod(start, 4)
    samples = []
    for k in range(num_samples or 1):
        w = words(seed, first, (lane + total + 3) // 4, k, stream)
        if dtype == torch.float64:
            u = w.astype(np.float64) * 2.0**-32 + 2.0**-33
        else:  # both roundings of fma(float32(w), 2**-32, 2**-33) happen in float32
            u = (w.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
            u = u.astype(np.float64)
        eps = np.empty_like(u)
        for even in (0, 2):
            r, angle = np.sqrt(-2.0 * np.log(u[:, even])), 2.0 * np.pi * u[:, even + 1]
            eps[:, even], eps[:, even + 1] = r * np.cos(angle), r * np.sin(angle)
        samples.append(eps.reshape(-1)[lane : lane + total].reshape(shape))
    return torch.from_numpy(np.stack(samples) if num_samples else samples[0])


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    """Exact float64 copies on the CPU that require the gradients their originals require."""
    return [
        None if t is None else t.detach().cpu().double().requires_grad_(t.requires_grad)
        for t in tensors
    ]


def phi(x: Tensor) -> Tensor:
    """exp(x) - 1 - x of a float64 tensor, correct to a relative error of about 1e-13."""
    tiny = x.abs() < 0.05
    y = torch.where(tiny, x, 0.0)
    series = sum(y**n / math.factorial(n) for n in range(2, 12))
    return torch.where(tiny, series, torch.expm1(x) - x)


def exact_phi(x: Tensor) -> list[mpmath.mpf]:
    with mpmath.workdps(50):
        return [mpmath.expm1(mpmath.mpf(v)) - mpmath.mpf(v) for v in x.double().tolist()]


def reduce(nats: Tensor, reduction: str, batch_dims: int = 1) -> Tensor:
    per_sample = nats.flatten(batch_dims).sum(-1) if nats.dim() > batch_dims else nats
    return {
        "none": lambda: nats,
        "sample": lambda: per_sample,
        "sum": per_sample.sum,
        "batchmean": lambda: per_sample.mean(),
    }[reduction]()


def kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    reduction: str = "sample",
) -> Tensor:
    """KL(q || p), of float64 tensors."""
    prior_mean = 0.0 if prior_mean is None else prior_mean
    prior_logvar = torch.tensor(0.0).double() if prior_logvar is None else prior_logvar
    squares = (mean - prior_mean) ** 2 * torch.exp(-prior_logvar)
    return reduce(0.5 * (phi(logvar - prior_logvar) + squares), reduction)


def sample(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mean + torch.exp(logvar / 2) * eps


def log_likelihood(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float = 0.0,
    reduction: str = "sample",
    batch_dims: int = 1,
) -> Tensor:
    """log N(x; mean, exp(logvar)), of float64 tensors."""
    logvar = torch.as_tensor(logvar, dtype=torch.float64)
    nats = -0.5 * ((x - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    return reduce(nats, reduction, batch_dims)


def std(
    p: Tensor,
    name: str,
    floor: float = 0.0,
    clamp: tuple[float, float] | None = None,
    soft_clamp: bool = False,
) -> Tensor:
    """The standard deviation that a parameter stands for, of a float64 tensor."""
    if soft_clamp:
        low, high = clamp
        p = low + (high - low) * torch.sigmoid(4 * (p - (low + high) / 2) / (high - low))
    elif clamp is not None:
        p = p.clamp(*clamp)
    if name == "logvar":
        return torch.sqrt(torch.exp(p) + floor)
    if name == "logstd":
        return torch.exp(p) + floor
    if name == "softplus_std":
        return torch.log1p(torch.exp(-p.abs())) + torch.relu(p) + floor
    return torch.sqrt(torch.where(p < floor, p - p.detach() + floor, p))


def elbo(
    recon_x: Tensor,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor,
    recon_logvar: Tensor | float = 0.0,
    beta: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    return reduce(beta * kl(mean, logvar) - log_likelihood(x, recon_x, recon_logvar), reduction)
