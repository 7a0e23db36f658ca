"""Training repeats, resumes and stops as it says, and beats the linear baseline."""

from __future__ import annotations

import math

import pytest
import torch

from fused_vae.baseline import ProbabilisticPCA
from fused_vae.config import TrainConfig
from fused_vae.data import Images
from fused_vae.errors import TrainingError, UserError
from tests.vae.support import train, trainer

pytestmark = pytest.mark.xdist_group("train")  # what its fixtures make is made once


def test_the_same_seed_gives_the_same_parameters(digits: tuple[Images, Images]) -> None:
    first, again = train(trainer(digits, epochs=1)), train(trainer(digits, epochs=1))
    other = train(trainer(digits, epochs=1, seed=1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_torchs_global_generator_has_no_part_in_it(digits: tuple[Images, Images]) -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = train(trainer(digits, epochs=1))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    again = train(trainer(digits, epochs=1))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_resuming_continues_bit_for_bit(digits: tuple[Images, Images]) -> None:
    whole = trainer(digits)
    expected = train(whole)
    stopped = trainer(digits)
    train(stopped, epochs=1)
    resumed = trainer(digits)
    resumed.restore(*stopped.state())
    assert resumed.progress.epoch == 1
    result = train(resumed)
    assert all(torch.equal(expected[k], result[k]) for k in expected)
    for row, other in zip(whole.progress.history, resumed.progress.history, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_no_two_steps_share_noise_or_images(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, epochs=2)
    seen = []
    original = job.step
    job.step = lambda x, numbers: seen.append(x) or original(x, numbers)  # type: ignore[method-assign,func-returns-value,assignment]
    train(job)
    levels = [(x * 17).floor().flatten(1) for x in seen]
    half = len(levels) // 2
    assert len(torch.cat(levels[:half])) == job.steps_per_epoch * job.config.batch_size
    epochs = torch.cat(levels[:half]), torch.cat(levels[half:])
    assert not torch.equal(*epochs)  # another order
    fractions = [(x * 17).frac().flatten() for x in seen]
    apart = [(a - b).abs().median() for a, b in zip(fractions, fractions[1:], strict=False)]
    assert min(apart) > 0.1  # equal noise would differ by rounding alone


def test_history_is_the_sum_of_its_parts(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, epochs=1)
    train(job)
    row = job.progress.history[0]
    assert row["elbo"] == pytest.approx(-row["rate"] - row["distortion"])
    assert row["train_elbo"] == pytest.approx(-row["train_rate"] - row["train_distortion"])
    assert row["bits_per_dim"] == pytest.approx(-row["elbo"] / 64 / math.log(2))
    with torch.no_grad():
        density = job.model(job.x_held_out).log_likelihood.mean()
    assert row["distortion"] == pytest.approx(float(-density) + 64 * math.log(17), rel=0.05)


def test_evaluation_does_not_depend_on_the_batch_size(digits: tuple[Images, Images]) -> None:
    job = trainer(digits)
    rows = []
    for size in (7, 100):
        job.config = TrainConfig(**{**job.config.to_dict(), "batch_size": size})
        rows.append({**job.evaluate(), "log_prob": job.log_prob(3)})
    for name in ("elbo", "rate", "log_prob"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-6)


def test_beta_is_the_weight_of_the_rate(digits: tuple[Images, Images]) -> None:
    free, bound = (trainer(digits, epochs=4, beta=beta) for beta in (0.01, 10.0))
    train(free)
    train(bound)
    assert free.progress.history[-1]["rate"] > 10 * bound.progress.history[-1]["rate"]


def test_nan_is_reported_with_its_layer_and_not_trained_on(
    digits: tuple[Images, Images],
) -> None:
    job = trainer(digits)
    with torch.no_grad():
        job.model.decoder[2].bias[0] = math.nan
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 0: .* nan, first in layer decoder\.2, for 100 "):
        train(job)
    after = job.model.state_dict()
    assert all(torch.equal(before[k], after[k]) or "decoder.2.bias" in k for k in before)


def test_a_trained_vae_beats_probabilistic_pca(digits: tuple[Images, Images]) -> None:
    job = trainer(digits, latent=2, epochs=25, batch_size=50, lr=4e-3)
    train(job)
    x = digits[0].dequantise(torch.Generator().manual_seed(0))
    exact = ProbabilisticPCA.fit(x, 2).log_prob(job.x_held_out).mean()
    baseline = float(exact) - job.images.nats_per_density
    assert job.progress.history[-1]["elbo"] > baseline + 3
    assert job.log_prob(20) > job.progress.history[-1]["elbo"]


def test_bfloat16_trains_to_nearly_the_same_elbo(digits: tuple[Images, Images]) -> None:
    exact, low = trainer(digits), trainer(digits, precision="bfloat16")
    train(exact)
    train(low)
    expected = exact.progress.history[-1]["elbo"]
    assert low.progress.history[-1]["elbo"] == pytest.approx(expected, rel=0.01)
    assert low.progress.history[-1]["elbo"] != expected


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("network", "big", "--network must be one of conv, mlp, hierarchy, got big"),
        ("variance", "x", "--variance must be one of"),
        ("precision", "int8", "--precision must be one of"),
        ("latent", 0, "--latent must be at least 1"),
        ("epochs", -1, "--epochs must be at least 0"),
        ("batch_size", -1, "--batch-size must be at least 0"),
        ("sigma", 0.0, "--sigma must be a positive number"),
        ("lr", math.nan, "--lr must be a positive number"),
        ("beta", -1.0, "--beta must be at least 0"),
        ("held_out", 1.0, "--held-out must lie between 0 and 1"),
        ("seed", 2**63, "--seed must be below"),
    ],
)
def test_bad_options_are_refused(option: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{option: value})  # type: ignore[arg-type]


def test_a_batch_larger_than_the_data_is_refused(digits: tuple[Images, Images]) -> None:
    with pytest.raises(UserError, match="--batch-size 1618 is more than the 1617"):
        TrainConfig(batch_size=1618).resolved(digits[0])
