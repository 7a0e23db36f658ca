"""NaN and infinity propagate as the formula says, into their own element and row and no further."""

import math

import pytest
import torch

from fused_elbo import (
    DiagonalGaussian,
    NoiseKey,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from tests.ops.support import DTYPES, leaf

KEY = NoiseKey(seed=13)
INF, NAN = math.inf, math.nan
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


def one_element(value, dtype, device, fill=0.0):
    """[3, 37] of a number, with another value in an element of row 1 that is in no tail."""
    t = torch.full((3, 37), fill, dtype=dtype, device=device)
    t[1, 5] = value
    return t


def same(actual, expected):
    """Equal, NaN included."""
    return torch.equal(torch.nan_to_num(actual, nan=123.0), torch.nan_to_num(expected, nan=123.0))


# logvar -> phi(logvar) / 2 and std, as limits of the formulas
LOGVARS = {
    INF: (INF, INF),
    -INF: (INF, 0.0),
    NAN: (NAN, NAN),
    200.0: (INF, None),
    -200.0: (99.5, None),
}


@pytest.mark.parametrize("logvar", LOGVARS)
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_a_logvar_beyond_all_bounds_gives_the_limit_of_the_kl(dtype, logvar, device):
    expected = LOGVARS[logvar][0]
    if dtype == torch.float64 and logvar == 200.0:
        expected = 0.5 * (math.exp(200) - 201)
    zero = torch.zeros(3, 37, dtype=dtype, device=device)
    kl = gaussian_kl(zero, one_element(logvar, dtype, device))
    assert kl[0] == kl[2] == 0
    assert kl[1].item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **ids)
def test_a_far_logvar_in_a_long_row_counts_once(dtype, device, interpreted):
    """The CPU repeats a block that has one; what the first loop has summed must not remain."""
    shape = (2, 400) if interpreted else (2, 5_000)
    mean = leaf(*shape, dtype=dtype, device=device).detach()
    logvar = leaf(*shape, dtype=dtype, device=device).detach()
    logvar[1, [3, 300, -1]] = -100.0 if dtype == torch.float32 else -1500.0
    exact = (0.5 * (mean.double() ** 2 + logvar.double().exp() - 1 - logvar.double())).sum(1)
    for kl in (gaussian_kl(mean, logvar), reparameterize_kl(mean, logvar, key=KEY)[1]):
        assert ((kl - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("logvar", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_a_logvar_beyond_all_bounds_gives_the_limit_of_z(dtype, logvar, device):
    mean = torch.full((3, 37), 0.5, dtype=dtype, device=device)
    plain = reparameterize(mean, torch.zeros_like(mean), key=KEY)
    z = reparameterize(mean, one_element(logvar, dtype, device), key=KEY)
    expected = plain.clone()
    noise = plain[1, 5] - 0.5
    expected[1, 5] = {INF: math.copysign(INF, noise.item()), -INF: 0.5}.get(logvar, NAN)
    assert same(z, expected)


@pytest.mark.parametrize("mean", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_a_mean_beyond_all_bounds_reaches_z_and_kl_of_its_row_alone(dtype, mean, device):
    zero = torch.zeros(3, 37, dtype=dtype, device=device)
    plain, _ = reparameterize_kl(zero, zero, key=KEY)
    z, kl = reparameterize_kl(one_element(mean, dtype, device), zero, key=KEY)
    expected = plain.clone()
    expected[1, 5] = mean
    assert same(z, expected)
    assert kl[0] == kl[2] == 0
    assert kl[1].item() == pytest.approx(abs(mean), nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **ids)
def test_nan_stays_nan_through_the_clamp(dtype, device):
    moments = torch.cat((torch.zeros(3, 37), one_element(NAN, torch.float32, "cpu")), 1).to(
        device, dtype
    )
    z, kl = DiagonalGaussian.from_moments(moments).sample_kl(key=KEY)
    assert z[1, 5].isnan()
    assert kl[1].isnan()
    assert int(z.isnan().sum()) == int(kl.isnan().sum()) == 1


@pytest.mark.parametrize("logvar", [INF, -INF, 200.0, -200.0])
def test_the_clamp_bounds_what_is_beyond_it(logvar, device):
    moments = torch.cat((torch.zeros(3, 37), one_element(logvar, torch.float32, "cpu")), 1).to(
        device
    )
    edge = moments.clamp(-30.0, 20.0)
    for a, b in zip(
        DiagonalGaussian.from_moments(moments).sample_kl(key=KEY),
        DiagonalGaussian.from_moments(edge, clamp=None).sample_kl(key=KEY),
    ):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["mean", "logvar", "prior_mean", "prior_logvar"])
def test_a_nan_makes_gradients_nan_in_its_element_alone(where, device):
    inputs = {
        n: torch.zeros(3, 37, device=device)
        for n in ("mean", "logvar", "prior_mean", "prior_logvar")
    }
    inputs[where][1, 5] = NAN
    for t in inputs.values():
        t.requires_grad_()
    z, kl = reparameterize_kl(**inputs, key=KEY)
    (z.sum() + kl.sum()).backward()
    for name, t in inputs.items():
        bad = t.grad.isnan()
        assert int(bad.sum()) <= 1
        assert bad[1, 5] or name != where
        assert (t.grad[~bad]).isfinite().all()
    assert kl[1].isnan()
    assert kl[0] == kl[2] == 0


def test_gradients_at_an_infinite_variance_follow_the_formula(device):
    """d kl / d logvar = expm1(logvar) / 2: infinite at +inf, -1/2 at -inf."""
    for logvar, expected in ((INF, INF), (-INF, -0.5), (NAN, NAN), (200.0, INF), (-200.0, -0.5)):
        lv = one_element(logvar, torch.float32, device).requires_grad_()
        gaussian_kl(torch.zeros(3, 37, device=device), lv).sum().backward()
        assert lv.grad[1, 5].item() == pytest.approx(expected, nan_ok=True)
        assert int((lv.grad != 0).sum()) == 1


@pytest.mark.parametrize("where", ["x", "mean", "logvar"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_a_nan_in_a_likelihood_reaches_its_row_alone(dtype, where, device):
    inputs = {n: torch.zeros(3, 37, dtype=dtype, device=device) for n in ("x", "mean", "logvar")}
    inputs[where][1, 5] = NAN
    for t in inputs.values():
        t.requires_grad_()
    ll = gaussian_log_likelihood(**inputs)
    assert ll.isnan().tolist() == [False, True, False]
    ll.sum().backward()
    for t in inputs.values():
        assert int(t.grad.isnan().sum()) == 1
        assert t.grad[1, 5].isnan()


def test_limits_of_the_log_likelihood(device):
    x, mean = torch.zeros(3, 37, device=device), one_element(INF, torch.float32, device)
    assert gaussian_log_likelihood(x, mean).isinf().tolist() == [False, True, False]
    ll = gaussian_log_likelihood(x, x, one_element(INF, torch.float32, device))
    assert ll[1] == -INF  # a flat density
    ll = gaussian_log_likelihood(x, x + 1, one_element(-INF, torch.float32, device))
    assert ll[1].isnan()  # -inf of the residual, +inf of the constant
    assert (
        gaussian_log_likelihood(x, x, -INF).isnan() | gaussian_log_likelihood(x, x, -INF).isinf()
    ).all()


def test_a_nan_reaches_the_elbo_loss_and_the_part_it_is_in(device):
    tensors = [leaf(3, 37, device=device).detach() for _ in range(4)]
    for place, part in ((0, "log_likelihood"), (1, "log_likelihood"), (2, "kl"), (3, "kl")):
        inputs = [t.clone() for t in tensors]
        inputs[place][1, 5] = NAN
        out = elbo_loss(*inputs, reduction="sample")
        assert out.loss.isnan().tolist() == [False, True, False]
        assert getattr(out, part).isnan().tolist() == [False, True, False]
        other = out.kl if part == "log_likelihood" else out.log_likelihood
        assert not other.isnan().any()
