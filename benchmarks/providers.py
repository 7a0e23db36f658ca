"""Who computes it: PyTorch eager and compiled, this package on each backend, and other libraries.

A provider builds, for a workload it offers, a function from inputs to outputs: ``(z, kl)`` for
latents and moments, ``(log_likelihood,)``, ``(loss,)``. The last output is in nats.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import formulas
from .workloads import Inputs, Workload

Outputs = tuple[Tensor, ...]
Compute = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Provider:
    """name; what it is; why it cannot run here (None: it can); and how it computes a workload.

    quick, curve: whether it is part of --quick, and of the cost curves; slow_start: it takes
    seconds before the first call of every size, too many for the curves of --quick.
    """

    name: str
    what: str
    reason: Callable[[torch.device], str | None]
    build: Callable[[Workload], Compute | None]
    quick: bool = False
    curve: bool = False
    slow_start: bool = False


def _runs(device: torch.device) -> None:
    return None


# ------------------------------------------------------------------------------ eager and compiled


def _eager(workload: Workload) -> Compute | None:
    formula = _formula(workload)
    if formula is None:
        return None
    function, names = formula
    return lambda inputs: _tuple(function(*(inputs.get(n) for n in names)))


def _formula(workload: Workload) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """The formula of a workload and the names of its tensors."""
    if workload.kind == "latent" and workload.prior:
        names = ("mean", "logvar", "prior_mean", "prior_logvar")
        return formulas.sample_and_kl_to_prior, names
    if workload.kind == "latent":
        # Closed over, not passed: torch.compile is to see a constant.
        samples = workload.samples
        return lambda mean, logvar: formulas.sample_and_kl(mean, logvar, samples), (
            "mean",
            "logvar",
        )
    if workload.kind == "moments":
        return formulas.moments, ("moments",)
    if workload.kind == "likelihood":
        batch_dims = 2 if workload.samples else 1
        return (
            lambda x, mean, logvar: formulas.log_likelihood(x, mean, logvar, batch_dims),
            ("x", "mean", "logvar"),
        )
    if workload.kind == "elbo":
        return formulas.elbo, ("mean", "x", "posterior_mean", "posterior_logvar")
    return None


def _compiled(workload: Workload, mode: str) -> Compute | None:
    formula = _formula(workload)
    if formula is None:
        return None
    function, names = formula
    compiled = torch.compile(function, mode=mode, dynamic=False)
    return lambda inputs: _tuple(compiled(*(inputs.get(n) for n in names)))


def _tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _compiler_reason(device: torch.device) -> str | None:
    from torch._inductor import cpp_builder

    if device.type == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:
            return f"torch.compile finds no C++ compiler: {error}"
    return None


# ------------------------------------------------------------------------------------- this package


def _fused(workload: Workload, backend: str) -> Compute | None:
    from fused_elbo import (
        DiagonalGaussian,
        elbo_loss,
        gaussian_log_likelihood,
        reparameterize_kl,
    )

    samples = workload.samples or None
    # As users call it: the device decides, and only Triton has to be asked for beside CUDA.
    asked: dict[str, Any] = {"backend": backend} if backend == "triton" else {}
    if workload.kind == "latent":
        if samples:
            asked["num_samples"] = samples
        if workload.prior:
            return lambda i: reparameterize_kl(
                i["mean"], i["logvar"], i["prior_mean"], i["prior_logvar"], **asked
            )
        return lambda i: reparameterize_kl(i["mean"], i["logvar"], **asked)
    if workload.kind == "moments":
        return lambda i: DiagonalGaussian.from_moments(i["moments"]).sample_kl(**asked)
    if workload.kind == "likelihood":
        return lambda i: (gaussian_log_likelihood(i["x"], i["mean"], i.get("logvar"), **asked),)
    if workload.kind == "elbo":
        return lambda i: (
            elbo_loss(i["mean"], i["x"], i["posterior_mean"], i["posterior_logvar"], **asked).loss,
        )
    return None


def _fused_reason(device: torch.device, backend: str) -> str | None:
    import fused_elbo

    reason = fused_elbo.available_backends()[backend]
    if reason is not None:
        return reason
    if (backend == "cpu") != (device.type == "cpu"):
        return f"it does not run on {device.type} tensors"
    return None


# ---------------------------------------------------------------------------------- other libraries


def _importable(*modules: str) -> Callable[[torch.device], str | None]:
    def reason(device: torch.device) -> str | None:
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # a peer may break in any way
                return f"{module} cannot be imported: {error!r}"
        return None

    return reason


def _functional(workload: Workload) -> Compute | None:
    """The losses that torch.nn.functional has ready. mse_loss leaves out the constant."""
    if workload.samples or workload.kind not in ("likelihood", "elbo"):
        return None
    batch = workload.shape[0]
    if workload.kind == "elbo":

        def elbo(i: Inputs) -> Outputs:
            mean, logvar = i["posterior_mean"], i["posterior_logvar"]
            kl = -0.5 * torch.sum(1 + logvar - mean.square() - logvar.exp())
            return ((0.5 * F.mse_loss(i["mean"], i["x"], reduction="sum") + kl) / batch,)

        return elbo
    if workload.variance == "unit":
        return lambda i: (-0.5 * F.mse_loss(i["mean"], i["x"], reduction="sum"),)

    def likelihood(i: Inputs) -> Outputs:
        var = i["logvar"].exp().expand(i["mean"].shape)
        return (-F.gaussian_nll_loss(i["mean"], i["x"], var, full=True, reduction="sum"),)

    return likelihood


def _distributions(workload: Workload) -> Compute | None:
    from torch.distributions import Independent, Normal, kl_divergence

    def normal(mean: Tensor, logvar: Tensor) -> Independent:
        return Independent(Normal(mean, torch.exp(0.5 * logvar)), mean.dim() - 1)

    if workload.kind == "latent":

        def latent(i: Inputs) -> Outputs:
            mean, logvar = i["mean"], i["logvar"]
            q = normal(mean, logvar)
            if workload.prior:
                p = normal(i["prior_mean"], i["prior_logvar"])
            else:
                p = normal(torch.zeros_like(mean), torch.zeros_like(logvar))
            z = q.rsample((workload.samples,) if workload.samples else ())
            return z, kl_divergence(q, p)

        return latent
    if workload.kind == "likelihood":
        event = len(workload.shape) - (2 if workload.samples else 1)

        def likelihood(i: Inputs) -> Outputs:
            logvar = i.get("logvar")
            std = 1.0 if logvar is None else torch.exp(0.5 * logvar)
            return (Independent(Normal(i["mean"], std), event).log_prob(i["x"]),)

        return likelihood
    return None


def _diffusers(workload: Workload) -> Compute | None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    if workload.kind != "moments":
        return None

    def moments(i: Inputs) -> Outputs:
        posterior = DiagonalGaussianDistribution(i["moments"])
        return posterior.sample(), posterior.kl()

    return moments


def _pyro(workload: Workload) -> Compute | None:
    import pyro
    from pyro.distributions import Normal
    from pyro.infer import TraceMeanField_ELBO

    if workload.prior or workload.samples or workload.kind not in ("latent", "elbo"):
        return None
    estimator = TraceMeanField_ELBO()
    of_elbo = workload.kind == "elbo"
    mean_name, logvar_name = (
        ("posterior_mean", "posterior_logvar") if of_elbo else ("mean", "logvar")
    )

    def compute(i: Inputs) -> Outputs:
        mean, logvar = i[mean_name], i[logvar_name]
        drawn: list[Tensor] = []

        def guide() -> None:
            std = torch.exp(0.5 * logvar)
            drawn.append(pyro.sample("z", Normal(mean, std).to_event(mean.dim())))

        def model() -> None:
            pyro.sample("z", Normal(torch.zeros_like(mean), 1.0).to_event(mean.dim()))
            if of_elbo:
                recon = i["mean"]
                pyro.sample("x", Normal(recon, 1.0).to_event(recon.dim()), obs=i["x"])

        loss = estimator.differentiable_loss(model, guide)
        return (loss / workload.shape[0],) if of_elbo else (drawn[0], loss)

    return compute


def _pythae(workload: Workload) -> Compute | None:
    from types import SimpleNamespace

    from pythae.models import VAE

    if workload.kind != "elbo":
        return None
    model = SimpleNamespace(model_config=SimpleNamespace(reconstruction_loss="mse"))

    def elbo(i: Inputs) -> Outputs:
        mean, logvar = i["posterior_mean"].flatten(1), i["posterior_logvar"].flatten(1)
        return VAE.loss_function(model, i["mean"], i["x"], mean, logvar, None)[:1]

    return elbo


# ------------------------------------------------------------------------ the cost of being called


class _Empty(torch.autograd.Function):
    """The signature of the Function behind reparameterize_kl, and none of its work."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        kernels: object,
        params: object,
        mean: Tensor,
        logvar: Tensor,
        prior_mean: None,
        prior_logvar: None,
        seed: Tensor,
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, logvar, prior_mean, prior_logvar, seed)
        ctx.kernels, ctx.params = kernels, params
        return torch.empty_like(mean), mean.new_empty(mean.shape[:1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mean, logvar, *_ = ctx.saved_tensors
        return None, None, torch.empty_like(mean), torch.empty_like(logvar), None, None, None


def _empty(workload: Workload) -> Compute | None:
    if workload.name != "latent-8x4":
        return None
    seed = torch.zeros((), dtype=torch.int64)
    return lambda i: _Empty.apply(  # type: ignore[no-any-return]
        None, None, i["mean"], i["logvar"], None, None, seed.to(i["mean"].device)
    )


FUSED_BACKENDS = ("cpu", "cuda", "triton")

PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("eager", "the formula in PyTorch", _runs, _eager, quick=True, curve=True),
        Provider(
            "compile",
            "torch.compile of the formula",
            _compiler_reason,
            functools.partial(_compiled, mode="default"),
            quick=True,
            curve=True,
            slow_start=True,
        ),
        Provider(
            "compile-max",
            "torch.compile, max-autotune-no-cudagraphs",
            _compiler_reason,
            functools.partial(_compiled, mode="max-autotune-no-cudagraphs"),
        ),
        *(
            Provider(
                f"fused-{backend}",
                f"this package, backend {backend}",
                functools.partial(_fused_reason, backend=backend),
                functools.partial(_fused, backend=backend),
                quick=True,
                curve=True,
            )
            for backend in FUSED_BACKENDS
        ),
        Provider("functional", "F.mse_loss, F.gaussian_nll_loss", _runs, _functional, quick=True),
        Provider(
            "distributions",
            "torch.distributions, Normal and kl_divergence",
            _runs,
            _distributions,
        ),
        Provider(
            "diffusers",
            "diffusers, DiagonalGaussianDistribution",
            _importable("diffusers.models.autoencoders.vae"),
            _diffusers,
            quick=True,
        ),
        Provider("pyro", "Pyro, TraceMeanField_ELBO", _importable("pyro"), _pyro),
        Provider("pythae", "pythae, VAE.loss_function", _importable("pythae.models"), _pythae),
        Provider("empty", "an autograd.Function that does nothing", _runs, _empty, quick=True),
    )
}


def is_fused(name: str) -> bool:
    return name.startswith("fused-")
