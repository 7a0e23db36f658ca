"""What is measured: shapes that occur in practice, their inputs, and the bytes they must move."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

KINDS = ("latent", "moments", "likelihood", "elbo", "training")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """One forward and backward pass.

    kind: latent (sample and KL), moments (the same from one tensor that holds mean and logvar),
        likelihood, elbo (loss of a whole VAE) or training (a step of `fused_vae`).
    shape: of mean (of moments for kind moments; of the reconstruction for likelihood and elbo).
    latent: shape of the posterior, for elbo. variance: unit, scalar (one learned number), channel
        or full. samples: K. spread: how far the posterior is from N(0, I).
    """

    name: str
    title: str
    kind: str
    shape: Shape
    latent: Shape = ()
    prior: bool = False
    variance: str = "unit"
    samples: int = 0
    channels_last: bool = False
    spread: float = 0.5
    quick: bool = False
    curve: bool = field(default=False, compare=False)

    @property
    def elements(self) -> int:
        """What ns per element is counted in: latent elements, or those of the reconstruction."""
        half = 2 if self.kind == "moments" else 1
        return math.prod(self.shape) // half * max(self.samples if self.kind == "latent" else 1, 1)

    def moved_bytes(self, itemsize: int) -> tuple[int, int]:
        """(forward, backward): every input read once, every output written once, nothing else."""
        n = math.prod(self.shape) // (2 if self.kind == "moments" else 1)
        if self.kind in ("latent", "moments"):
            inputs = 4 if self.prior else 2
            samples = max(self.samples, 1)
            forward, backward = inputs + samples, 2 * inputs + samples
        elif self.kind == "likelihood":
            inputs = 3 if self.variance == "full" else 2
            forward, backward = inputs, inputs + (2 if self.variance == "full" else 1)
        elif self.kind == "elbo":  # the gradients are written in the forward pass
            n_latent = math.prod(self.latent)
            return (3 * n + 4 * n_latent) * itemsize, 0
        else:
            return 0, 0
        return forward * n * itemsize, backward * n * itemsize


@dataclass
class Inputs:
    """The tensors of a workload. ``leaves`` want gradients; ``grad_z`` flows into z."""

    tensors: dict[str, Tensor]
    leaves: list[Tensor]
    grad_z: Tensor | None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def double(self) -> Inputs:
        tensors = {n: t.detach().double() for n, t in self.tensors.items()}
        wanted = {id(t) for t in self.leaves}
        leaves = [tensors[n].requires_grad_() for n, t in self.tensors.items() if id(t) in wanted]
        return Inputs(tensors, leaves, None if self.grad_z is None else self.grad_z.double())


def make_inputs(workload: Workload, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Ordinary numbers: half precision is slower on denormals and infinities."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Shape, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=generator).mul_(scale).to(device=device, dtype=dtype)
        return made.to(memory_format=torch.channels_last) if workload.channels_last else made

    shape, spread = workload.shape, workload.spread
    tensors: dict[str, Tensor] = {}
    grad_z = None
    if workload.kind in ("latent", "moments"):
        z_shape = shape
        if workload.kind == "moments":
            tensors["moments"] = normal(shape, spread)
            z_shape = (shape[0], shape[1] // 2, *shape[2:])
        else:
            tensors["mean"], tensors["logvar"] = normal(shape, spread), normal(shape, spread)
        if workload.prior:
            tensors["prior_mean"] = normal(shape, spread)
            tensors["prior_logvar"] = normal(shape, spread)
        grad_z = normal((workload.samples, *z_shape) if workload.samples else z_shape)
        leaves = list(tensors.values())
    elif workload.kind in ("likelihood", "elbo"):
        data_shape = shape[1:] if workload.samples else shape
        data = normal(data_shape)
        tensors["mean"] = normal(shape)
        variances = {"scalar": (), "channel": (shape[1], 1, 1), "full": shape}
        if workload.variance in variances:
            tensors["logvar"] = normal(variances[workload.variance], spread)
        if workload.kind == "elbo":
            tensors["posterior_mean"] = normal(workload.latent, spread)
            tensors["posterior_logvar"] = normal(workload.latent, spread)
        leaves = list(tensors.values())
        tensors["x"] = data
    else:
        tensors["x"], leaves = normal(shape), []
    for leaf in leaves:
        leaf.requires_grad_()
    return Inputs(tensors, leaves, grad_z)


def _latent(name: str, shape: Shape, note: str = "", **options: object) -> Workload:
    title = f"reparameterize_kl {list(shape)}{note}"
    return Workload(name, title, "latent", shape, **options)  # type: ignore[arg-type]


def _moments(name: str, shape: Shape, note: str = "", **options: object) -> Workload:
    title = f"from_moments {list(shape)}{note}"
    return Workload(name, title, "moments", shape, **options)  # type: ignore[arg-type]


def _likelihood(name: str, shape: Shape, variance: str, **options: object) -> Workload:
    title = f"gaussian_log_likelihood {list(shape)}, {variance} variance"
    return Workload(name, title, "likelihood", shape, variance=variance, **options)  # type: ignore[arg-type]


_IMAGE = (16, 3, 256, 256)

WORKLOADS = (
    _latent("latent-64x16384", (64, 16384), quick=True),
    _latent("latent-1024x128", (1024, 128), quick=True),
    _latent("latent-128x32", (128, 32), quick=True),
    _latent("latent-prior", (16, 16, 32, 32), ", q || p", prior=True, quick=True),
    _moments("moments", (16, 8, 64, 64), quick=True),
    _moments("moments-channels-last", (16, 8, 64, 64), ", channels_last", channels_last=True),
    _latent("latent-video", (1, 32, 21, 60, 104)),
    _latent("latent-50-samples", (128, 32), ", K = 50", samples=50),
    _latent("latent-collapsed", (1024, 128), ", posterior near the prior", spread=1e-3),
    _latent("latent-8x4", (8, 4), quick=True),
    _likelihood("likelihood-unit", _IMAGE, "unit", quick=True),
    _likelihood("likelihood-scalar", _IMAGE, "scalar", quick=True),
    _likelihood("likelihood-channel", _IMAGE, "channel"),
    _likelihood("likelihood-full", _IMAGE, "full", quick=True),
    _likelihood("likelihood-mnist", (128, 784), "unit"),
    _likelihood("likelihood-50-samples", (50, 128, 784), "unit", samples=50),
    Workload("elbo-mnist", "elbo_loss [128, 784], latent [128, 32]", "elbo", (128, 784), (128, 32)),
    Workload(
        "elbo-image",
        "elbo_loss [16, 3, 256, 256], latent [16, 4, 32, 32]",
        "elbo",
        _IMAGE,
        (16, 4, 32, 32),
        quick=True,
    ),
    Workload(
        "training", "training step of the MLP VAE, [128, 1, 28, 28]", "training", (128, 1, 28, 28)
    ),
)


def curve(powers: list[int]) -> list[Workload]:
    """The same two operations over sizes, 64 rows each: ns per element against the size."""
    made = []
    for power in powers:
        shape = (64, 2**power // 64)
        size = f"2^{power}"
        made.append(
            Workload(
                f"curve-latent-{power}", f"reparameterize_kl, {size}", "latent", shape, curve=True
            )
        )
        made.append(
            Workload(
                f"curve-likelihood-{power}",
                f"gaussian_log_likelihood, {size}",
                "likelihood",
                shape,
                curve=True,
            )
        )
    return made
