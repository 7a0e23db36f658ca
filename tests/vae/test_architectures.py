"""Flows, priors and layers that ``fused-vae train`` can be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_elbo import NoiseKey
from fused_vae import FlexibleVAE, HierarchicalVAE, objectives
from fused_vae.config import TrainConfig
from fused_vae.data import Images
from fused_vae.distributed import Ranks
from fused_vae.errors import UserError
from fused_vae.objective_options import OBJECTIVES
from fused_vae.recipe import Batch
from tests.vae.support import train, trainer

pytestmark = pytest.mark.xdist_group("architectures")  # what its fixtures make is made once

KEY = NoiseKey(5)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "planar": {"flow": "planar"},
    "iaf": {"flow": "iaf"},
    "mixture": {"prior": "mixture"},
    "vamp": {"prior": "vamp"},
    "real-nvp": {"prior": "real-nvp"},
    "iaf, vamp": {"flow": "iaf", "prior": "vamp"},
    "hierarchy": {"network": "hierarchy"},
}
LAYERS = {"network": "hierarchy", "layers": 2, "latent": 5}
HALF_WAY = {"warm_up": "linear", "warm_up_steps": 32}
CHOICES: dict[str, dict[str, Any]] = {
    "geco": {"objective_options": {"target": 150.0}},
    "beta-nll": {"variance": "predicted"},
    "free-bits": {"objective_options": {"group": "layer", "floor": 2.0}},
    "balanced": HALF_WAY,
}


def refused(objective: str, **options: Any) -> bool:
    """Whether the combination has no meaning."""
    try:
        TrainConfig(objective=objective, **{**CHOICES.get(objective, {}), **options})
    except UserError:
        return True
    return False


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_every_parameter_and_resumes_bit_for_bit(
    name: str, digits: tuple[Images, Images]
) -> None:
    whole = trainer(digits, **ARCHITECTURES[name])
    before, elbo = {k: v.clone() for k, v in whole.model.state_dict().items()}, whole.evaluate()
    expected = train(whole)
    assert [k for k in before if torch.equal(before[k], expected[k])] == []
    row = whole.progress.history[-1]
    assert row["elbo"] > elbo["elbo"] + 20
    assert whole.log_prob(10) > row["elbo"]
    stopped = trainer(digits, **ARCHITECTURES[name])
    train(stopped, epochs=1)
    resumed = trainer(digits, **ARCHITECTURES[name])
    resumed.restore(*stopped.state())
    result = train(resumed)
    assert all(torch.equal(expected[k], result[k]) for k in expected)
    assert {**row, "seconds": 0} == {**resumed.progress.history[-1], "seconds": 0}


@pytest.mark.parametrize("name", ["planar", "iaf", "real-nvp"])
def test_starts_as_the_plain_vae(name: str, digits: tuple[Images, Images]) -> None:
    """Whatever x: a flow's context starts at zero (an IAF has its gates nearly open)."""
    job = trainer(digits, **ARCHITECTURES[name])
    assert isinstance(job.model, FlexibleVAE)
    x = job.x_held_out[:7]
    z_0 = job.model.encode(x).rsample(key=KEY)
    z, _ = job.model.transform(z_0, x)
    if name == "iaf":
        at_zero = job.model.transform(torch.zeros_like(z_0), x)[0]
        assert torch.equal(at_zero, at_zero[:1].expand(7, -1))
    else:
        torch.testing.assert_close(z, z_0, rtol=0, atol=1e-6)
        kl = job.model.sample_kl(x, key=KEY)[1]
        torch.testing.assert_close(kl, job.model.encode(x).kl(), rtol=1e-4, atol=1e-4)


def test_the_latent_dimensions_are_shared_by_the_layers(digits: tuple[Images, Images]) -> None:
    def sizes(**options: Any) -> tuple[int, ...]:
        model = trainer(digits, network="hierarchy", **options).model
        assert isinstance(model, HierarchicalVAE)
        return model.latents

    assert sizes(latent=10) == (3, 3, 4)
    assert sizes(latent=2) == (1, 1)
    assert sizes(latent=8, layers=4) == (2, 2, 2, 2)


def test_the_history_has_the_rate_of_each_layer(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, **LAYERS, epochs=1)
    train(job)
    row = job.progress.history[-1]
    assert row["rate_1"] + row["rate_2"] == pytest.approx(row["rate"], rel=1e-6)
    assert "rate_3" not in row
    with torch.no_grad():
        out = job.model(job.x_held_out, key=job.key.fold_in(1))
    assert [row["rate_1"], row["rate_2"]] == pytest.approx(out.layer_kl.mean(1).tolist(), rel=1e-4)


def test_vamp_starts_from_training_pictures(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, prior="vamp")
    levels = (job.model.state_dict()["prior.pseudo_inputs"] * 17).floor()
    assert torch.equal(levels, digits[0].pixels[:50].float())


def test_objectives_without_meaning_are_refused() -> None:
    assert {o for o in OBJECTIVES if refused(o, network="mlp")} == {"balanced"}
    assert {o for o in OBJECTIVES if refused(o, flow="iaf")} == {"balanced", "beta-tc"}
    assert {o for o in OBJECTIVES if refused(o, prior="vamp")} == {"balanced", "beta-tc", "infovae"}
    several = {o for o in OBJECTIVES if refused(o, network="hierarchy")}
    assert several == {"iwae", "stl", "dreg", "beta-tc", "infovae"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "x"}, "--flow must be one of none, planar, iaf, got x"),
        ({"prior": "x"}, "--prior must be one of standard, mixture, vamp, real-nvp, got x"),
        ({"layers": 2}, "--layers needs --network hierarchy"),
        ({"network": "hierarchy", "layers": 11}, "--layers 11 is more than the 10 latent dim"),
        ({"network": "hierarchy", "flow": "iaf"}, "--flow has no meaning with --network hierarchy"),
        ({"network": "hierarchy", "prior": "vamp"}, "--prior has no meaning with"),
        ({"objective": "balanced"}, "balanced needs several layers: --network hierarchy"),
        ({"objective": "balanced", **LAYERS}, "acts while beta is below 1: give --warm-up"),
        ({"objective": "free-bits", "flow": "iaf"}, "--group dimension needs a rate per dimension"),
        (
            {
                "objective": "free-bits",
                "prior": "vamp",
                "objective_options": {"group": "layer", "order": "clamp-first"},
            },
            "--order clamp-first needs the exact rate of each image",
        ),
        ({"objective": "beta-tc", "flow": "iaf"}, "needs --flow none: the total correlation is"),
    ],
)
def test_bad_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("objective", "architecture"),
    [
        (objective, architecture)
        for architecture in ({"flow": "planar", "prior": "mixture"}, LAYERS)
        for objective in OBJECTIVES
        if not refused(objective, **architecture)
    ],
)
def test_objectives_train_with_estimated_rates_and_with_layers(
    objective: str, architecture: dict[str, Any], digits: tuple[Images, Images]
) -> None:
    job = trainer(
        digits, objective=objective, epochs=1, **{**CHOICES.get(objective, {}), **architecture}
    )
    before = job.evaluate()["elbo"]
    train(job)
    row = job.progress.history[-1]
    assert row["elbo"] > before + 10
    assert row["train_elbo"] == pytest.approx(row["elbo"], abs=60)


def test_free_bits_and_balance_are_of_the_real_layers(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, **LAYERS)
    train(job, epochs=1)
    weights = job.model.state_dict()
    x = job.x_held_out[:40]
    out = job.model(x, key=KEY)
    per_layer = out.layer_kl.detach()
    assert per_layer.mean(1).min() > 0.01
    distortion = -float(out.log_likelihood.mean())

    def value(objective: str, **options: Any) -> float:
        job = trainer(digits, objective=objective, **LAYERS, **options)
        job.model.load_state_dict(weights)
        price = job.recipe.price(0.25, 0)
        parts = job.recipe.parts(job.model, x, KEY, price)
        batch = Batch(40, 64, len(digits[0]), KEY, Ranks(), price)
        return float(job.recipe.loss(parts, batch))

    floor = float(per_layer.mean())  # between the two
    free = per_layer.mean(1).clamp(min=floor).sum()
    found = value("free-bits", objective_options={"group": "layer", "floor": floor})
    assert found == pytest.approx(distortion + float(free), rel=1e-5)
    used = per_layer.mean(1) / torch.tensor([2.0, 3.0])
    rate = (2 * used / used.sum() * per_layer.mean(1)).sum()
    assert value("balanced", **HALF_WAY) == pytest.approx(distortion + 0.25 * float(rate), rel=1e-5)
    ll, layers = out.log_likelihood, list(per_layer)
    assert float(objectives.balanced(ll, layers, [2, 3], 0.25).loss) == pytest.approx(
        distortion + 0.25 * float(rate), rel=1e-5
    )


def test_capacity_holds_an_estimated_rate(digits: tuple[Images, Images]) -> None:
    own = {"capacity": 3.0, "capacity_weight": 100.0, "capacity_steps": 50}
    job = trainer(
        digits, flow="planar", objective="capacity", objective_options=own, epochs=8, latent=2
    )
    train(job)
    assert job.progress.history[-1]["train_rate"] == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("name", ["iaf, vamp", "hierarchy"])
def test_compiled_training_is_eager_training(name: str, digits: tuple[Images, Images]) -> None:
    options = {**ARCHITECTURES[name], "batch_size": 800, "epochs": 1}
    eager, compiled = (trainer(digits, **options, compile=c) for c in (False, True))
    train(eager)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    train(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
    expected, found = (job.progress.history[-1] for job in (eager, compiled))
    assert {**found, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-4)


@pytest.mark.parametrize("name", ["iaf, vamp", "real-nvp", "hierarchy"])
def test_bfloat16_trains_to_nearly_the_same_elbo(name: str, digits: tuple[Images, Images]) -> None:
    rows = []
    for precision in ("float32", "bfloat16"):
        job = trainer(digits, **ARCHITECTURES[name], precision=precision, epochs=1)
        train(job)
        rows.append(job.progress.history[-1]["elbo"])
    assert rows[1] == pytest.approx(rows[0], abs=3)
    assert rows[1] != rows[0]


@torch.no_grad()
def test_several_samples_log_the_rate_of_the_model_not_of_the_base(
    digits: tuple[Images, Images],
) -> None:
    job = trainer(digits, prior="mixture", objective="dreg")
    x = job.x_held_out[:9]
    parts = job.recipe.parts(job.model, x, KEY, 1.0)
    torch.testing.assert_close(parts["kl"], job.model.sample_kl(x, key=KEY)[1])
    assert isinstance(job.model, FlexibleVAE)
    assert not torch.allclose(parts["kl"], job.model.encode(x).kl(), atol=0.01)
