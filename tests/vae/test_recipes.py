"""Every objective that ``--objective`` offers trains, and is the formula of its name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_elbo import NoiseKey
from fused_vae import importance, objectives
from fused_vae.config import TrainConfig
from fused_vae.data import Images
from fused_vae.distributed import Ranks
from fused_vae.errors import TrainingError, UserError
from fused_vae.objective_options import OBJECTIVES, options
from fused_vae.recipe import Batch
from fused_vae.train import Trainer
from tests.vae.support import train

pytestmark = pytest.mark.xdist_group("recipes")  # what its fixtures make is made once

NEEDS: dict[str, dict[str, Any]] = {
    "geco": {"objective_options": {"target": 150.0}},
    "beta-nll": {"variance": "predicted"},
    "capacity": {"objective_options": {"capacity": 4.0, "capacity_steps": 16}},
    "balanced": {"network": "hierarchy", "warm_up": "linear", "warm_up_steps": 32},
}
KEY = NoiseKey(5)


def trainer(digits: tuple[Images, Images], objective: str, **more: Any) -> Trainer:
    values: dict[str, Any] = {
        "data": "digits",
        "network": "mlp",
        "latent": 4,
        "epochs": 2,
        "objective": objective,
        **NEEDS.get(objective, {}),
        **more,
    }
    return Trainer(TrainConfig(**values).resolved(digits[0]), *digits)


def loss(job: Trainer, x: Tensor) -> Tensor:
    """Of the first step's objective on these images, noise named by `KEY`."""
    parts = job.recipe.parts(job.model, x, KEY, job.recipe.price(job.config.beta, 0))
    size = len(x)
    return job.recipe.loss(parts, Batch(size, x[0].numel(), len(job.images), KEY, Ranks())).detach()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_resumes_bit_for_bit(
    objective: str, digits: tuple[Images, Images]
) -> None:
    whole = trainer(digits, objective)
    before = whole.evaluate()["elbo"]
    expected = train(whole)
    assert whole.progress.history[-1]["elbo"] > before + 20
    stopped = trainer(digits, objective)
    train(stopped, epochs=1)
    resumed = trainer(digits, objective)
    resumed.restore(*stopped.state())
    result = train(resumed)
    assert all(torch.equal(expected[k], result[k]) for k in expected)
    for row, other in zip(whole.progress.history, resumed.progress.history, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_in_bfloat16(objective: str, digits: tuple[Images, Images]) -> None:
    exact = trainer(digits, objective, epochs=1)
    low = trainer(digits, objective, epochs=1, precision="bfloat16")
    train(exact)
    train(low)
    found, expected = (job.progress.history[-1]["elbo"] for job in (low, exact))
    assert found == pytest.approx(expected, abs=2)
    assert found != expected


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_held_out_figures_are_those_of_the_elbo(
    objective: str, digits: tuple[Images, Images]
) -> None:
    job = trainer(digits, objective)
    with torch.no_grad():
        out = job.model(job.x_held_out, key=job.key.fold_in(1))
    row = job.evaluate()
    assert row["rate"] == pytest.approx(float(out.kl.mean()), rel=1e-5)
    assert row["elbo"] == pytest.approx(float(out.elbo.mean()) - 64 * math.log(17), rel=1e-5)


def test_the_recipes_are_their_formulas(digits: tuple[Images, Images]) -> None:
    x = digits[0].dequantise(torch.Generator().manual_seed(0))[:50]
    job = trainer(digits, "elbo")
    with torch.no_grad():  # posteriors that differ from the prior and from each other
        for parameter in job.model.encoder.parameters():
            parameter.mul_(3)
    weights = job.model.state_dict()
    q = job.model.encode(x)
    z, kl = q.sample_kl(key=KEY)
    mean, logvar = job.model.decode(z)
    log_likelihood = torch.distributions.Normal(mean, math.exp(logvar.item() / 2)).log_prob(x)
    ll = log_likelihood.flatten(1).sum(1)
    per_dimension = 0.5 * (q.mean.square() + q.logvar.exp() - 1 - q.logvar)

    def value(objective: str, /, **more: Any) -> float:
        job = trainer(digits, objective, **more)
        job.model.load_state_dict(weights)
        return float(loss(job, x))

    def with_options(objective: str, **own: Any) -> float:
        return value(objective, objective_options=own)

    plain = float((kl - ll).detach().mean())
    assert value("elbo") == pytest.approx(plain, rel=1e-5)
    assert value("elbo", beta=3.0) == pytest.approx(float((3 * kl - ll).mean()), rel=1e-5)
    distortion = -float(ll.mean())
    floor = float(per_dimension.mean())
    rates = {
        ("mean-first", "dimension"): per_dimension.mean(0).clamp(min=floor).sum(),
        ("clamp-first", "dimension"): per_dimension.clamp(min=floor).sum(1).mean(),
        ("mean-first", "layer"): kl.mean().clamp(min=floor),
        ("clamp-first", "layer"): kl.clamp(min=floor).mean(),
    }
    for (order, group), rate in rates.items():
        found = with_options("free-bits", floor=floor, order=order, group=group)
        assert found == pytest.approx(distortion + float(rate), rel=1e-5)
    assert with_options("soft-free-bits", floor=5.0) == pytest.approx(plain, rel=1e-5)
    capacity = with_options("capacity", capacity=3.0, capacity_weight=7.0, capacity_steps=1)
    assert capacity == pytest.approx(distortion + 7 * float(kl.mean()), rel=1e-5)  # step 0: C = 0
    density = 64 * math.log(17)  # the target is a distortion as it is printed
    geco = with_options("geco", target=150.0)
    assert geco == pytest.approx(float(kl.mean()) + distortion + density - 150, rel=1e-5)
    for name in ("iwae", "stl", "dreg"):
        expected = importance.importance_weighted(job.model, x, 3, estimator=name, key=KEY).loss  # type: ignore[arg-type]
        assert with_options(name, samples=3) == pytest.approx(float(expected), rel=1e-5)
    tc = importance.total_correlation(ll, q, z, len(digits[0]), beta=4.0).loss
    assert with_options("beta-tc", tc_weight=4.0) == pytest.approx(float(tc), rel=1e-5)
    variance = (x - mean).square().mean()
    best = 32 * (variance.log() + 1 + math.log(2 * math.pi)) + kl.mean()
    assert value("optimal-sigma") == pytest.approx(float(best), rel=1e-5)


def test_infovae_compares_the_codes_with_samples_of_the_prior(
    digits: tuple[Images, Images],
) -> None:
    x = digits[0].dequantise(torch.Generator().manual_seed(0))[:50]
    values = []
    for weight in (1.0, 1001.0):
        job = trainer(digits, "infovae", objective_options={"alpha": 0.25, "mmd_weight": weight})
        values.append(float(loss(job, x)))
    z, kl = job.model.encode(x).sample_kl(key=KEY)
    ll = job.model(x, key=KEY).log_likelihood
    mmd = (values[1] - values[0]) / 1000
    assert values[0] == pytest.approx(float(0.75 * kl.mean() - ll.mean()) + 0.25 * mmd, rel=1e-4)
    g = torch.Generator().manual_seed(1)
    against = [
        float(objectives.maximum_mean_discrepancy(z, torch.randn(50, 4, generator=g)))
        for _ in range(50)
    ]
    assert min(against) < mmd < max(against)


def test_beta_nll_reweights_the_pixels(digits: tuple[Images, Images]) -> None:
    x = digits[0].dequantise(torch.Generator().manual_seed(0))[:50]
    job = trainer(digits, "beta-nll", objective_options={"power": 1.0})
    z, kl = job.model.encode(x).sample_kl(key=KEY)
    mean, logvar = job.model.decode(z)
    assert isinstance(logvar, Tensor)
    pixels = torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(x) * logvar.exp()
    expected = float((kl - pixels.flatten(1).sum(1)).mean())
    assert float(loss(job, x)) == pytest.approx(expected, rel=1e-4)


def test_geco_holds_the_distortion(digits: tuple[Images, Images]) -> None:
    own = {"target": 165.0, "decay": 0.9}
    job = trainer(digits, "geco", objective_options=own, epochs=40, lr=4e-3)
    train(job)
    assert job.progress.history[-1]["train_distortion"] == pytest.approx(165, abs=2)


def test_capacity_holds_the_rate(digits: tuple[Images, Images]) -> None:
    own = {"capacity": 3.0, "capacity_weight": 100.0, "capacity_steps": 50}
    job = trainer(digits, "capacity", objective_options=own, epochs=8)
    train(job)
    assert job.progress.history[-1]["train_rate"] == pytest.approx(3, abs=0.3)


def test_optimal_sigma_is_the_root_mean_squared_error(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, "optimal-sigma", epochs=4)
    train(job)
    with torch.no_grad():
        out = job.model(job.x_held_out, key=KEY)
    rms = float((job.x_held_out - out.reconstruction).square().mean().sqrt())
    assert job.sigma() == pytest.approx(rms, rel=0.05)


def test_the_state_of_an_objective_does_not_move_on_a_bad_step(
    digits: tuple[Images, Images],
) -> None:
    job = trainer(digits, "geco")
    x, numbers = next(job._batches(0))
    job.step(x, numbers)
    before = job.recipe.state()
    with pytest.raises(TrainingError, match="step 1: the loss became nan"):
        job.step(x * math.nan, numbers)
    assert job.recipe.state() == before


@pytest.mark.parametrize(
    ("warm_up", "expected"),
    [
        ("linear", [0, 1, 2, 2]),
        ("cosine", [0, 1, 2, 2]),
        ("cyclical", [0, 2, 0, 2]),
        ("none", [2, 2, 2, 2]),
    ],
)
def test_warm_up_ends_at_beta(warm_up: Any, expected: list[float]) -> None:
    steps = 0 if warm_up == "none" else 10
    config = TrainConfig(beta=2.0, warm_up=warm_up, warm_up_steps=steps)
    assert [config.beta_at(s) for s in (0, 5, 10, 15)] == pytest.approx(expected)


def test_warm_up_prices_the_rate_of_each_step(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, "elbo", beta=2.0, warm_up="linear", warm_up_steps=32, epochs=3)
    train(job)
    assert [row["beta"] for row in job.progress.history] == pytest.approx([15 / 16, 31 / 16, 2])
    plain = trainer(digits, "elbo", beta=2.0, epochs=3)
    train(plain)
    rates = [j.progress.history[0]["train_rate"] for j in (job, plain)]
    assert rates[0] > 1.5 * rates[1]


def test_automatic_warm_up_is_a_share_of_the_steps(digits: tuple[Images, Images]) -> None:
    config = TrainConfig(data="digits", epochs=10)  # 160 steps
    steps = [
        replace(config, warm_up=name).resolved(digits[0]).warm_up_steps  # type: ignore[arg-type]
        for name in ("linear", "cosine", "cyclical", "none")
    ]
    assert steps == [32, 32, 40, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "x"}, "--objective must be one of elbo, free-bits, .*, got x"),
        ({"objective": "geco"}, "geco needs --target"),
        ({"objective": "iwae", "beta": 2.0}, "--beta has no meaning with --objective iwae"),
        ({"objective": "stl", "warm_up": "linear"}, "--warm-up has no meaning with"),
        ({"warm_up": "x"}, "--warm-up must be one of none, linear, cosine, cyclical"),
        ({"warm_up_steps": 5}, "--warm-up-steps needs --warm-up"),
        ({"objective_options": {"floor": 1.0}}, "--floor belongs to .* free-bits, soft-free-bits,"),
        ({"objective": "optimal-sigma", "variance": "unit"}, "needs --variance learned, got unit"),
        ({"objective": "beta-nll"}, "needs --variance predicted, got learned"),
    ],
)
def test_bad_combinations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("objective", "name", "value"),
    [
        ("free-bits", "floor", -1.0),
        ("free-bits", "order", "x"),
        ("free-bits", "group", "x"),
        ("soft-free-bits", "floor", math.nan),
        ("capacity", "capacity", -1.0),
        ("capacity", "capacity_weight", -1.0),
        ("capacity", "capacity_steps", 0),
        ("geco", "target", math.inf),
        ("geco", "speed", -1.0),
        ("geco", "decay", 1.0),
        ("iwae", "samples", 0),
        ("beta-tc", "tc_weight", -1.0),
        ("infovae", "alpha", 2.0),
        ("infovae", "mmd_weight", 0.5),
        ("beta-nll", "power", 1.5),
    ],
)
def test_options_out_of_range_are_refused(objective: str, name: str, value: Any) -> None:
    more = {**NEEDS.get(objective, {})}
    more["objective_options"] = {**more.get("objective_options", {}), name: value}
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        TrainConfig(objective=objective, **more)
    assert name in options()
