"""The objectives that can be trained; their formulas are in `objectives` and `importance`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fused_elbo import DiagonalGaussian, NoiseKey, gaussian_log_likelihood, reparameterize

from . import importance, objectives
from .architecture import Architecture, Model
from .data import Images
from .errors import UserError
from .flexible import FlexibleVAE
from .hierarchy import HierarchicalVAE
from .model import VAE
from .recipe import Batch, Parts, Recipe, at_least, option

NOISE_PRIOR = 1 << 32
"""Folded into a step's key for samples of the prior; layers fold in small numbers."""


def _rate_and_likelihood(
    model: Model, x: Tensor, key: NoiseKey, reduction: str = "sample"
) -> tuple[Tensor, Tensor, Tensor]:
    """z, KL (reduced), log p(x|z) ``[b]``, with gradient."""
    z, kl = model.sample_kl(x, key=key, reduction=reduction)
    mean, logvar = model.decode(z)
    return z, kl, gaussian_log_likelihood(x, mean, logvar)


def _all(parts: Parts, batch: Batch, *names: str) -> list[Tensor]:
    return [batch.ranks.gather(parts[name], batch.size) for name in names]


def _by_layer(model: Model, kl: Tensor) -> Tensor:
    """``[b, layers]`` from the KL of each dimension."""
    sizes = model.latents if isinstance(model, HierarchicalVAE) else (kl.shape[1],)
    return torch.stack([layer.sum(1) for layer in kl.split(sizes, 1)], 1)


@dataclass
class ELBO(Recipe):
    """Distortion + beta * rate."""

    has_beta = True

    def weight(self, price: float) -> float:
        return price

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        out = model(x, key=key, beta=price)
        return {"loss": out.loss, "log_likelihood": out.log_likelihood, "kl": out.kl}


@dataclass
class _Plain(Recipe):
    """Objectives of the whole batch's log-likelihoods and rates."""

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        _, kl, log_likelihood = _rate_and_likelihood(model, x, key)
        return {"log_likelihood": log_likelihood, "kl": kl}


@dataclass
class FreeBits(Recipe):
    """`objectives.free_bits`, per latent dimension or per stochastic layer."""

    floor: float = option(0.5, "nats of rate that are free, per group (soft-free-bits: in all)")
    order: Literal["mean-first", "clamp-first"] = option(
        "mean-first",
        "the floor applies to the mean over the batch (mean-first) or to each image (clamp-first)",
    )
    group: Literal["dimension", "layer"] = option(
        "dimension", "what a floor is for: each latent dimension, or each stochastic layer"
    )

    def check(self, model: Architecture) -> None:
        at_least("floor", self.floor, 0)
        if model.flexible and self.group == "dimension":
            raise UserError(
                "--group dimension needs a rate per dimension, which --flow and --prior do not"
                " have; --group layer has its floor for the whole rate"
            )
        if model.flexible and self.order == "clamp-first":
            raise UserError(
                "--order clamp-first needs the exact rate of each image; with --flow or --prior it"
                " is an estimate, right on average: --order mean-first"
            )

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        if isinstance(model, FlexibleVAE):
            _, kl, log_likelihood = _rate_and_likelihood(model, x, key)
            return {"log_likelihood": log_likelihood, "kl": kl, "kl_groups": kl[:, None]}
        _, kl, log_likelihood = _rate_and_likelihood(model, x, key, "none")
        groups = kl if self.group == "dimension" else _by_layer(model, kl)
        return {"log_likelihood": log_likelihood, "kl": kl.sum(1), "kl_groups": groups}

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        log_likelihood, groups = _all(parts, batch, "log_likelihood", "kl_groups")
        order: Any = self.order.replace("-", "_")
        return objectives.free_bits(log_likelihood, groups.unbind(1), self.floor, order=order).loss


@dataclass
class SoftFreeBits(_Plain):
    """`objectives.SoftFreeBits`."""

    floor: float = option(5.0, "nats of rate wanted")

    def check(self, model: Architecture) -> None:
        at_least("floor", self.floor, 0)

    def __post_init__(self) -> None:
        self._objective = objectives.SoftFreeBits(self.floor)

    def weight(self, price: float) -> float:
        return self._objective.price

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        return self._objective(*_all(parts, batch, "log_likelihood", "kl")).loss

    def state(self) -> dict[str, Any]:
        return {"price": self._objective.price}

    def restore(self, state: dict[str, Any]) -> None:
        self._objective.price = state["price"]


@dataclass
class Capacity(Recipe):
    """`objectives.capacity`; the target rises from 0 over the first `capacity_steps`.

    The paper weights by 1000. Where rate and distortion are exact nats, 10 holds the rate as well,
    and leaves the code free to be useful: on MNIST at 20 nats the distortion is 230 nats less.
    """

    capacity: float = option(25.0, "the rate wanted at the end, in nats")
    capacity_weight: float = option(10.0, "price of a nat off the capacity")
    capacity_steps: int = option(500, "steps over which the capacity rises from 0")

    def check(self, model: Architecture) -> None:
        at_least("capacity", self.capacity, 0)
        at_least("capacity_weight", self.capacity_weight, 0)
        at_least("capacity_steps", self.capacity_steps, 1)

    def price(self, beta: float, step: int) -> float:
        return self.capacity * objectives.linear_warm_up(step, self.capacity_steps)

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        _, kl, log_likelihood = _rate_and_likelihood(model, x, key)
        loss = objectives.capacity(log_likelihood, kl, price, self.capacity_weight).loss
        return {"loss": loss, "log_likelihood": log_likelihood, "kl": kl}


@dataclass
class GECO(_Plain):
    """`objectives.GECO`; the target is on the scale of the reported distortion."""

    target: float = option(
        math.nan, "the distortion wanted, in nats per image as training prints it"
    )
    speed: float = option(0.1, "of the multiplier, for a constraint missed by one nat per pixel")
    decay: float = option(0.99, "of the constraint's moving average")

    def check(self, model: Architecture) -> None:
        if not math.isfinite(self.target):
            raise UserError(
                "--objective geco needs --target, the distortion wanted, in nats per image as"
                " training prints it"
            )
        at_least("speed", self.speed, 0)
        if not 0 <= self.decay < 1:
            raise UserError(f"--decay must be at least 0 and below 1, got {self.decay}")

    def __post_init__(self) -> None:
        self._objective = objectives.GECO(self.target, decay=self.decay)

    def prepare(self, model: Model, images: Images) -> None:
        self._objective.target = self.target - images.nats_per_density
        # Nats grow with the pixels: without this, large images throw the multiplier about.
        self._objective.speed = self.speed / math.prod(images.shape)

    def weight(self, price: float) -> float:
        return 1 / self._objective.multiplier

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        return self._objective(*_all(parts, batch, "log_likelihood", "kl")).loss

    def state(self) -> dict[str, Any]:
        return {"multiplier": self._objective.multiplier, "average": self._objective.average}

    def restore(self, state: dict[str, Any]) -> None:
        self._objective.multiplier = state["multiplier"]
        self._objective.average = state["average"]


@dataclass
class IWAE(Recipe):
    """`importance.importance_weighted`, the gradient of the bound itself."""

    one_layer = "its samples are those of one latent vector"
    estimator: ClassVar[importance.Estimator] = "iwae"
    samples: int = option(8, "per image")

    def check(self, model: Architecture) -> None:
        at_least("samples", self.samples, 1)

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        assert isinstance(model, VAE)
        log_weight, q = importance.log_weights(
            model, x, self.samples, estimator=self.estimator, key=key
        )
        with torch.no_grad():
            flexible = isinstance(model, FlexibleVAE)
            kl = model.sample_kl(x, key=key)[1] if flexible else q.kl()
        loss = -importance.bound(log_weight).mean()
        # E[log weight] is the ELBO, so that with the exact rate this has the mean of log p(x|z).
        return {"loss": loss, "log_likelihood": log_weight.detach().mean(0) + kl, "kl": kl}


@dataclass
class STL(IWAE):
    """The same bound, sticking the landing."""

    estimator = "stl"


@dataclass
class DReG(IWAE):
    """The same bound, doubly reparameterized."""

    estimator = "dreg"


@dataclass
class BetaTC(Recipe):
    """`importance.total_correlation`."""

    gaussian_posterior = "the total correlation is that of Gaussian posteriors"
    standard_prior = "it prices each dimension against N(0, 1)"
    one_layer = "the total correlation is that of one latent vector"
    tc_weight: float = option(6.0, "price of the total correlation")

    def check(self, model: Architecture) -> None:
        at_least("tc_weight", self.tc_weight, 0)

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        assert isinstance(model, VAE)
        q = model.encode(x)
        z, kl = q.sample_kl(key=key)
        mean, logvar = model.decode(z)
        log_likelihood = gaussian_log_likelihood(x, mean, logvar)
        posterior = {"z": z, "mean": q.mean, "logvar": q.logvar}
        return {"log_likelihood": log_likelihood, "kl": kl.detach(), **posterior}

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        log_likelihood, z, mean, logvar = (
            t.float() for t in _all(parts, batch, "log_likelihood", "z", "mean", "logvar")
        )
        q = DiagonalGaussian(mean, logvar)
        return importance.total_correlation(
            log_likelihood, q, z, batch.data_size, beta=self.tc_weight
        ).loss


@dataclass
class InfoVAE(Recipe):
    """`objectives.info_vae` with the maximum mean discrepancy, against as many prior samples as
    images.
    """

    standard_prior = "samples of a learned prior carry no gradient to it"
    one_layer = "its samples of the prior are those of one latent vector"
    alpha: float = option(0.0, "takes this share of the rate's price away")
    mmd_weight: float = option(1000.0, "lambda; the discrepancy's price is alpha + lambda - 1")

    def check(self, model: Architecture) -> None:
        if not self.alpha <= 1:
            raise UserError(f"--alpha must be at most 1, got {self.alpha}")
        if not self.alpha + self.mmd_weight >= 1:
            raise UserError(
                f"--mmd-weight must be at least 1 - alpha = {1 - self.alpha:g}, got"
                f" {self.mmd_weight}"
            )

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        z, kl, log_likelihood = _rate_and_likelihood(model, x, key)
        return {"log_likelihood": log_likelihood, "kl": kl, "z": z}

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        log_likelihood, kl, z = _all(parts, batch, "log_likelihood", "kl", "z")
        zeros = torch.zeros_like(z, dtype=torch.float32)
        prior = reparameterize(zeros, zeros, key=batch.key.fold_in(NOISE_PRIOR))
        return objectives.info_vae(
            log_likelihood, kl, z.float(), prior, alpha=self.alpha, weight=self.mmd_weight
        ).loss


@dataclass
class OptimalSigma(Recipe):
    """`objectives.optimal_sigma`: the learned sigma is set, not trained, to that of each batch."""

    def check(self, model: Architecture) -> None:
        if model.variance != "learned":
            raise UserError(
                f"--objective optimal-sigma needs --variance learned, got {model.variance}"
            )

    def prepare(self, model: Model, images: Images) -> None:
        self._floor = images.rounding_error**2
        cast(nn.Parameter, model.likelihood.logvar).requires_grad_(False)

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        z, kl = model.sample_kl(x, key=key)
        mean, logvar = model.decode(z)
        with torch.no_grad():
            log_likelihood = gaussian_log_likelihood(x, mean, logvar)
        squared_error = (x - mean).float().square().flatten(1).sum(1)
        return {"log_likelihood": log_likelihood, "kl": kl, "squared_error": squared_error}

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        squared_error, kl = _all(parts, batch, "squared_error", "kl")
        self._variance = squared_error.detach().mean() / batch.event
        return objectives.optimal_variance(squared_error, batch.event, kl).loss

    def advance(self, model: Model) -> None:
        logvar = cast(nn.Parameter, model.likelihood.logvar)
        with torch.no_grad():
            logvar.copy_(self._variance.clamp(min=self._floor).log())


@dataclass
class BetaNLL(Recipe):
    """`objectives.beta_nll`."""

    power: float = option(0.5, "pixels are weighted by their variance to this power")

    def check(self, model: Architecture) -> None:
        if not 0 <= self.power <= 1:
            raise UserError(f"--power must lie between 0 and 1, got {self.power}")
        if model.variance != "predicted":
            raise UserError(
                f"--objective beta-nll needs --variance predicted, got {model.variance}"
            )

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        z, kl = model.sample_kl(x, key=key)
        mean, logvar = model.decode(z)
        objective = objectives.beta_nll(x, mean, cast(Tensor, logvar), kl, self.power)
        kl = kl.detach()
        return {"loss": objective.loss, "log_likelihood": objective.elbo + kl, "kl": kl}


@dataclass
class Balanced(Recipe):
    """`objectives.balanced`, over the stochastic layers."""

    has_beta = True

    def check(self, model: Architecture) -> None:
        if not model.hierarchical:
            raise UserError("--objective balanced needs several layers: --network hierarchy")

    def prepare(self, model: Model, images: Images) -> None:
        self._sizes = cast(HierarchicalVAE, model).latents

    def weight(self, price: float) -> float:
        return price

    def parts(self, model: Model, x: Tensor, key: NoiseKey, price: Tensor | float) -> Parts:
        _, kl, log_likelihood = _rate_and_likelihood(model, x, key, "none")
        layers = _by_layer(model, kl)
        return {"log_likelihood": log_likelihood, "kl": kl.sum(1), "kl_layers": layers}

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        log_likelihood, layers = _all(parts, batch, "log_likelihood", "kl_layers")
        kl = layers.unbind(1)
        return objectives.balanced(log_likelihood, kl, self._sizes, batch.price).loss
