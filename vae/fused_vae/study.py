"""Everything that the report says about a trained model, measured on its held-out pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_elbo import NoiseKey, gaussian_log_likelihood

from . import analysis, job, latents
from .architecture import Model
from .config import TrainConfig
from .data import Images
from .errors import UserError
from .randomness import DEQUANTISE, DEQUANTISE_HELD_OUT, NOISE_STUDY, seeded
from .run_folder import CHECKPOINT, EARLY

QUERIES = 500
CANDIDATES = 5000
CANDIDATE_NUMBERS = 2**28
"""Bound on candidates x pixels, so that large pictures fit into memory."""

OVERLAP_PICTURES = 500

FLOW_CANDIDATES = 1000
"""Every code goes back through the flow of every candidate."""


@dataclass(frozen=True)
class Study:
    """Nats are per picture."""

    rate: float
    kl_per_dimension: Tensor | None  # [latent]; None where the rate has no such shares
    spread: Tensor  # [latent]: variance of the codes over pictures
    candidates: int
    information: analysis.MutualInformation
    retrieval_rank: Tensor  # [Q]: candidates whose posterior is denser at z_i ~ q(z|x_i)
    match_rank: Tensor  # [Q]: candidates nearer to the decoded z_i than x_i is
    distortion_excess: dict[str, float]  # nats above a picture's own code, with another's
    overlap: dict[str, analysis.Overlap]  # "early", "late"
    gaussian: bool  # the posteriors, whose overlap then has a closed form
    residuals: Tensor  # (x - decoded) / sigma, a sample of the pixels

    @property
    def active(self) -> Tensor:
        """``[latent]`` bool."""
        return self.spread > analysis.ACTIVE_VARIANCE

    def retrieval(self, candidates: int) -> float:
        """How often a posterior sample is likeliest under its own posterior."""
        return analysis.hit_rate(self.retrieval_rank, self.candidates - 1, candidates)

    def match(self, candidates: int) -> float:
        """How often a decoded posterior sample is nearest to its own picture."""
        return analysis.hit_rate(self.match_rank, self.candidates - 1, candidates)

    def numbers(self) -> dict[str, float]:
        """For report.json."""
        n = self.candidates
        return {
            "candidates": n,
            "ln_candidates": math.log(n),
            "rate": self.rate,
            "information_lower": self.information.lower,
            "information_upper": min(self.information.upper, self.rate),
            "retrieval": self.retrieval(n),
            "retrieval_of_2": self.retrieval(2),
            "match": self.match(n),
            "match_of_2": self.match(2),
            "active_units": int(self.active.sum()),
            "residual_rms": float(self.residuals.square().mean().sqrt()),
            **{f"distortion_excess_{k}": v for k, v in self.distortion_excess.items()},
            **{f"overlap_within_{k}": v.within for k, v in self.overlap.items()},
            **{f"overlap_between_{k}": v.between for k, v in self.overlap.items()},
        }


@dataclass(frozen=True)
class Material:
    """A run, its pictures, and the codes of them all."""

    model: Model
    held_out: Images
    x: Tensor  # candidates, the held-out pictures first
    code: Tensor  # [N, latent]: posterior means of the candidates
    queries: int
    key: NoiseKey
    config: TrainConfig

    @property
    def labels(self) -> Tensor | None:
        """Of the queries."""
        labels = self.held_out.labels
        return None if labels is None else labels[: self.queries]


@torch.no_grad()
def prepare(run: Path) -> Material:
    """Load a complete run and encode its pictures.

    Raises:
        UserError: not a run, or its data are gone.
    """
    model, config, images = job.load_run(run)
    train, held_out = images.split(config.held_out, config.seed)
    x = torch.cat(
        [
            held_out.dequantise(seeded(config.seed, DEQUANTISE_HELD_OUT)),
            train.dequantise(seeded(config.seed, DEQUANTISE)),
        ]
    )
    most = CANDIDATES if config.flow == "none" else FLOW_CANDIDATES
    x = x[: max(2, min(most, CANDIDATE_NUMBERS // math.prod(images.shape)))]
    queries = min(QUERIES, len(held_out), len(x))
    key = NoiseKey(config.seed).fold_in(NOISE_STUDY)
    code = torch.cat([model.code(part) for part in x.split(250)])
    return Material(model, held_out, x, code, queries, key, config)


@torch.no_grad()
def measure(run: Path, material: Material) -> Study:
    """The whole study."""
    model, x = material.model, material.x
    count = material.queries
    own = torch.arange(count)
    z, rate = model.sample_kl(x[:count], key=material.key)
    decoded = [model.decode(part) for part in z.split(250)]
    mean = torch.cat([m for m, _ in decoded])
    logvar = decoded[0][1]
    if isinstance(logvar, Tensor) and logvar.dim() > 0:
        logvar = torch.cat([v for _, v in decoded if isinstance(v, Tensor)])
    density = latents.cross_log_density(model, z, x)
    distance = torch.cdist(mean.flatten(1).double(), x.flatten(1).double())

    sigma = torch.as_tensor(0.0 if logvar is None else logvar).div(2).exp()
    residuals = ((x[:count] - mean) / sigma).flatten()
    return Study(
        rate=float(rate.double().mean()),
        kl_per_dimension=latents.rate_per_dimension(model, x[:count], material.key),
        spread=analysis.spread(material.code),
        candidates=len(x),
        information=analysis.mutual_information(density, own),
        retrieval_rank=analysis.ranks(density, own),
        match_rank=analysis.ranks(-distance, own),
        distortion_excess=_excess(x[:count], mean, logvar, material.labels),
        overlap=_overlaps(run, material),
        gaussian=latents.encode(model, x[:1]) is not None,
        residuals=residuals[:: max(1, len(residuals) // 200_000)],
    )


def _excess(
    x: Tensor, mean: Tensor, logvar: Tensor | float | None, labels: Tensor | None
) -> dict[str, float]:
    """How much more distortion a picture has when decoded from the code of another."""

    def distortion(order: Tensor) -> float:
        spread = logvar[order] if isinstance(logvar, Tensor) and logvar.dim() > 0 else logvar
        return -float(gaussian_log_likelihood(x, mean[order], spread).double().mean())

    everyone = torch.arange(len(x))
    own = distortion(everyone)
    result = {"other": distortion(everyone.roll(1)) - own}
    if labels is not None:
        same = everyone.clone()
        for label in labels.unique():
            members = (labels == label).nonzero().flatten()
            same[members] = members.roll(1)
        result["same_class"] = distortion(same) - own
    return result


def _overlaps(run: Path, material: Material) -> dict[str, analysis.Overlap]:
    count = min(material.queries, OVERLAP_PICTURES)
    labels = None if material.labels is None else material.labels[:count]
    result = {}
    for name, checkpoint in (("early", EARLY), ("late", CHECKPOINT)):
        try:
            model, _, _ = job.load_run(run, checkpoint)
        except UserError:
            continue  # a run without its early checkpoint still has a report
        x = material.x[:count]
        if (q := latents.encode(model, x)) is not None:
            result[name] = analysis.overlap(q, labels)
            continue
        z, _ = model.sample_kl(x, key=material.key)
        density = latents.cross_log_density(model, z, x)
        result[name] = analysis.sampled_overlap(density, labels)
    return result
