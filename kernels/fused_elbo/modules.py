"""The operations as `nn.Module`s."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks
from .functional import gaussian_log_likelihood, reparameterize_kl
from .loss import ELBOOutput, elbo_loss
from .noise import NoiseKey
from .parametrization import Parametrization, parametrization

__all__ = ["ELBOLoss", "GaussianLogLikelihood", "Reparameterize"]


class Reparameterize(nn.Module):
    """`reparameterize_kl` with its options fixed: ``z, kl = module(mean, logvar)``.

    Args:
        num_samples, reduction, backend, param: as in `reparameterize_kl`.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        reduction: str = "sample",
        backend: str | None = None,
        param: str | Parametrization = "logvar",
    ) -> None:
        super().__init__()
        _checks.num_samples("Reparameterize", num_samples)
        _checks.reduction("Reparameterize", reduction)
        parametrization("Reparameterize", "param", param)
        self.num_samples, self.reduction, self.backend = num_samples, reduction, backend
        self.param = param

    def forward(
        self,
        mean: Tensor,
        logvar: Tensor,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        key: NoiseKey | None = None,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return reparameterize_kl(
            mean,
            logvar,
            prior_mean,
            prior_logvar,
            num_samples=self.num_samples,
            key=key,
            generator=generator,
            param=self.param,
            mask=mask,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, reduction={self.reduction!r}"


class GaussianLogLikelihood(nn.Module):
    """`gaussian_log_likelihood` as a module, with an optional variance of its own.

    Args:
        logvar: None (unit variance, or the one given to forward) or a number.
        learn: make ``logvar`` a parameter, one variance learned with the model (arXiv 2006.13202);
            it starts at the number given, or 0.
        reduction, backend, param: as in `gaussian_log_likelihood`.
    """

    def __init__(
        self,
        logvar: float | None = None,
        *,
        learn: bool = False,
        reduction: str = "sample",
        backend: str | None = None,
        param: str | Parametrization = "logvar",
    ) -> None:
        super().__init__()
        name = "GaussianLogLikelihood"
        parametrization(name, "param", param)
        self.param = param
        value = None if logvar is None else _checks.number(name, "logvar", logvar)
        _checks.reduction(name, reduction)
        self.reduction, self.backend = reduction, backend
        self.logvar: nn.Parameter | float | None = (
            nn.Parameter(torch.tensor(value or 0.0)) if learn else value
        )

    def forward(
        self,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor | float | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        return gaussian_log_likelihood(
            x,
            mean,
            self.logvar if logvar is None else logvar,
            param=self.param,
            mask=mask,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"logvar={self.logvar}, reduction={self.reduction!r}"


class ELBOLoss(nn.Module):
    """`elbo_loss` with its options fixed: ``loss, log_likelihood, kl = module(recon_x, x, mean,
    logvar)``.

    Args:
        beta, reduction, backend, param, recon_param: as in `elbo_loss`. ``beta`` may be changed
            between calls.
    """

    def __init__(
        self,
        beta: float = 1.0,
        reduction: str = "batchmean",
        backend: str | None = None,
        param: str | Parametrization = "logvar",
        recon_param: str | Parametrization = "logvar",
    ) -> None:
        super().__init__()
        parametrization("ELBOLoss", "param", param)
        parametrization("ELBOLoss", "recon_param", recon_param)
        self.param, self.recon_param = param, recon_param
        self.beta = _checks.number("ELBOLoss", "beta", beta)
        _checks.reduction("ELBOLoss", reduction, ("batchmean", "sum", "sample"))
        self.reduction, self.backend = reduction, backend

    def forward(
        self,
        recon_x: Tensor,
        x: Tensor,
        mean: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        recon_logvar: Tensor | float | None = None,
        mask: Tensor | None = None,
    ) -> ELBOOutput:
        return elbo_loss(
            recon_x,
            x,
            mean,
            logvar,
            kl=kl,
            recon_logvar=recon_logvar,
            beta=self.beta,
            param=self.param,
            recon_param=self.recon_param,
            mask=mask,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}"
