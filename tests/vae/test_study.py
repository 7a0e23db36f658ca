"""What the report measures, end to end, on a model whose I(x; z) is known in closed form.

x = s u + noise with u ~ N(0, I_d), decoded and encoded by exact linear maps (probabilistic PCA):
q(z|x) = N(a x.w, v) with v = 1 / (1 + snr) is the true posterior, the aggregate posterior is the
prior exactly, and the rate is the information, I(x; z) = d/2 ln(1 + snr).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey
from fused_vae import VAE, GaussianLikelihood, analysis, answers, study
from fused_vae.config import TrainConfig
from fused_vae.data import Images

PICTURES, QUERIES, LATENT, PIXELS = 2000, 500, 6, 16


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight)).double()})
    return layer


def material(information: float, beta_has_won: bool = False) -> study.Material:
    """Pictures ``[N, 1, 4, 4]``, and the model that made them.

    beta_has_won: the encoder gives the prior for every picture, as at a very high beta.
    """
    snr = math.expm1(2 * information / LATENT)
    variance = 1 / (1 + snr)
    g = torch.Generator().manual_seed(0)
    w = torch.linalg.qr(torch.randn(PIXELS, LATENT, generator=g, dtype=torch.float64))[0]
    sigma = 0.1
    scale = sigma * math.sqrt(snr)
    u = torch.randn(PICTURES, LATENT, generator=g, dtype=torch.float64)
    noise = torch.randn(PICTURES, PIXELS, generator=g, dtype=torch.float64)
    x = u @ w.T * scale + sigma * noise
    # E[z|x] = scale w.x / (scale^2 + sigma^2)
    encoder = linear(torch.cat([w.T * scale / (scale**2 + sigma**2), torch.zeros_like(w.T)]))
    encoder.bias.data[LATENT:] = math.log(variance)
    if beta_has_won:
        encoder.weight.data.zero_()
        encoder.bias.data.zero_()
    model = VAE(
        nn.Sequential(nn.Flatten(), encoder),
        nn.Sequential(linear(w * scale), nn.Unflatten(1, (1, 4, 4))),
        GaussianLikelihood("fixed", sigma),
    )
    x = x.reshape(-1, 1, 4, 4)
    held_out = Images("toy", x[:QUERIES], 256)
    return study.Material(model, held_out, x, model.code(x), QUERIES, NoiseKey(1), TrainConfig())


def measured(tmp_path: Path, of: study.Material) -> dict[str, float]:
    return study.measure(tmp_path / "no-checkpoints", of).numbers()


LN_N = math.log(PICTURES)
ERROR = 4 * math.sqrt(LATENT / QUERIES)  # each dimension's log-ratio has a variance of at most 1


@pytest.mark.parametrize("information", [0.5, 2.0, 5.0, 20.0, 40.0])
def test_rate_and_both_bounds_agree_with_the_information(
    tmp_path: Path, information: float
) -> None:
    values = measured(tmp_path, material(information))
    assert values["rate"] == pytest.approx(information, abs=ERROR)
    assert values["information_lower"] < min(information, LN_N) + ERROR
    assert values["information_upper"] > information - ERROR
    if information < LN_N - 2:  # far below the cap both bounds are tight
        assert values["information_lower"] == pytest.approx(information, abs=ERROR)
        assert values["information_upper"] == pytest.approx(information, abs=ERROR)
    if information > LN_N + 10:
        assert LN_N - 0.05 < values["information_lower"] < LN_N + 1e-6


def test_retrieval_is_near_one_where_information_is_far_above_ln_n(tmp_path: Path) -> None:
    values = measured(tmp_path, material(40.0))
    assert values["rate"] > LN_N + 10
    assert values["retrieval"] > 0.99
    assert values["match"] > 0.9
    assert values["match_of_2"] > 0.99
    assert values["distortion_excess_other"] > LN_N


def test_retrieval_is_near_chance_where_there_is_no_information(tmp_path: Path) -> None:
    values = measured(tmp_path, material(40.0, beta_has_won=True))
    assert values["rate"] == pytest.approx(0, abs=1e-12)
    assert values["information_lower"] == pytest.approx(0, abs=1e-9)
    assert values["active_units"] == 0
    assert values["retrieval"] == pytest.approx(1 / PICTURES, abs=4 * math.sqrt(1 / PICTURES / 500))
    assert values["retrieval_of_2"] == pytest.approx(0.5, abs=0.05)
    assert values["match_of_2"] == pytest.approx(0.5, abs=0.05)


def test_retrieval_turns_on_between(tmp_path: Path) -> None:
    shares = [measured(tmp_path, material(i))["retrieval"] for i in (1.0, 8.0, 14.0, 30.0)]
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert 0.05 < shares[1] < 0.8  # I = 8 where ln N = 7.6
    assert shares[3] > 0.95


def test_retrieval_among_fewer_is_what_drawing_them_gives(tmp_path: Path) -> None:
    """`hit_rate`'s combinatorics against drawing candidates."""
    of = material(5.0)
    result = study.measure(tmp_path / "no-checkpoints", of)
    assert isinstance(of.model, VAE)
    z, _ = of.model.sample_kl(of.x[:QUERIES], key=of.key)
    q = of.model.encode(of.x)
    density = analysis.cross_log_density(z, q.mean, q.logvar)
    g = torch.Generator().manual_seed(2)
    for candidates in (2, 10, 100):
        wins = []
        for row in range(QUERIES):
            others = torch.randperm(PICTURES - 1, generator=g)[: candidates - 1]
            others = others + (others >= row)
            wins.append(bool(density[row, row] > density[row, others].max()))
        share = sum(wins) / QUERIES
        error = 4 * math.sqrt(share * (1 - share) / QUERIES)
        assert result.retrieval(candidates) == pytest.approx(share, abs=error + 0.01)


def test_mix_up_and_residuals_cost_what_the_model_says(tmp_path: Path) -> None:
    """With an exact posterior x - decode(z) has variance sigma^2 in every direction; the code of
    another picture adds 2 scale^2 per dimension to the squared error, snr per dimension in nats.
    """
    information = 12.0
    values = measured(tmp_path, material(information))
    expected = LATENT * math.expm1(2 * information / LATENT)
    assert values["distortion_excess_other"] == pytest.approx(expected, rel=0.1)
    assert values["residual_rms"] == pytest.approx(1, abs=4 / math.sqrt(2 * QUERIES * PIXELS))


@pytest.mark.parametrize(
    ("information", "beta_has_won", "retrieval", "naming"),
    [
        (40.0, False, "compares the right pair", "where the lower bound stops"),
        (9.0, False, "the worry of the question is partly justified", "cannot exceed ln 2000"),
        (2.0, False, "tells two pictures apart", "must be confused"),
        (40.0, True, "the posterior has collapsed", "at least 0.0 and at most 0.0"),
    ],
)
def test_sentences_follow_the_information(
    tmp_path: Path, information: float, beta_has_won: bool, retrieval: str, naming: str
) -> None:
    result = study.measure(tmp_path / "no-checkpoints", material(information, beta_has_won))
    result = replace(result, overlap={"late": analysis.Overlap(math.nan, 0.5)})
    summary = {"sigma": 0.1}
    panels = answers.why_it_works(result, summary)
    assert retrieval in panels[0].meaning
    assert naming in panels[1].shown + panels[1].meaning
    line = [line.get_label() for line in panels[0].figure.axes[0].lines]
    assert any("I(x; z)" in str(label) for label in line) == (information == 2.0)
