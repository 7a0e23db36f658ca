"""Calls that the fast path takes, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [each.to(dtype).requires_grad_() for each in made]


EVENT = (6, 3, 5)
CALLS: dict[str, Callable[[list[Tensor]], object]] = {
    "reparameterize_kl": lambda t: reparameterize_kl(t[0], t[1]),
    "reparameterize_kl, prior": lambda t: reparameterize_kl(*t[:4]),
    "reparameterize_kl, none": lambda t: reparameterize_kl(t[0], t[1], reduction="none"),
    "reparameterize_kl, batchmean": lambda t: reparameterize_kl(*t[:4], reduction="batchmean"),
    "reparameterize": lambda t: reparameterize(t[0], t[1]),
    "gaussian_kl": lambda t: gaussian_kl(t[0], t[1], reduction="sum"),
    "gaussian_kl, prior": lambda t: gaussian_kl(*t[:4]),
    "samples, key": lambda t: reparameterize_kl(t[0], t[1], num_samples=3, key=NoiseKey(7, 2, 5)),
    "key in a tensor": lambda t: reparameterize_kl(t[0], t[1], key=NoiseKey(torch.tensor(9))),
    "logstd, prior": lambda t: reparameterize_kl(*t[:4], param="logstd"),
    "mask": lambda t: reparameterize_kl(t[0], t[1], mask=t[2].detach() > 0),
    "moments": lambda t: DiagonalGaussian.from_moments(torch.cat(t[:2], 1)).sample_kl(),
    "moments, KL": lambda t: DiagonalGaussian.from_moments(torch.cat(t[:2], 1)).kl(),
    "moments, z": lambda t: DiagonalGaussian.from_moments(torch.cat(t[:2], 2), 2, None).rsample(),
    "moments, none": lambda t: DiagonalGaussian(t[0], t[1]).sample_kl(reduction="none"),
    "moments, channels last": lambda t: DiagonalGaussian.from_moments(
        torch.cat(t[:2], 1)[..., None].to(memory_format=torch.channels_last), clamp=(-0.5, 0.5)
    ).sample_kl(),
    "moments, logstd": lambda t: DiagonalGaussian(t[0], t[1], "logstd").sample_kl(),
    "likelihood": lambda t: gaussian_log_likelihood(t[0], t[1]),
    "likelihood, number": lambda t: gaussian_log_likelihood(t[0], t[1], -1.5, reduction="sum"),
    "likelihood, scalar": lambda t: gaussian_log_likelihood(t[0], t[1], t[5]),
    "likelihood, full": lambda t: gaussian_log_likelihood(*t[:3], reduction="none"),
    "likelihood, channel": lambda t: gaussian_log_likelihood(t[0], t[1], t[4]),
    "likelihood, mask": lambda t: gaussian_log_likelihood(t[0], t[1], mask=t[2].detach() > 0),
    "elbo": lambda t: elbo_loss(*t[:4]),
    "elbo, beta": lambda t: elbo_loss(*t[:4], beta=4, reduction="sum"),
    "elbo, per sample": lambda t: elbo_loss(*t[:4], recon_logvar=t[5], reduction="sample"),
    "elbo, full": lambda t: elbo_loss(t[0], t[1], kl=t[6], recon_logvar=t[2]),
    "elbo, tensor beta": lambda t: elbo_loss(*t[:4], beta=torch.tensor(0.5)),
}


def run(call: Callable[[list[Tensor]], object], inputs: list[Tensor]) -> list[Tensor | None]:
    """Outputs, and gradients of a weighted sum of those that have one."""
    torch.manual_seed(3)
    outputs = call(inputs)
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
    total = sum(
        (each.double() * torch.linspace(0.5, 2, each.numel()).view(each.shape)).sum()
        for each in found
        if each.requires_grad
    )
    return [*found, *torch.autograd.grad(total, inputs, allow_unused=True)]
