"""e**h, e**h - 1, phi and log, from 1e-8 to beyond the end of the range, against 40 digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fused_elbo.triton.formulas import (
    expm1_of_double,
    exponential,
    exponentials,
    log1p_of_fraction,
    logarithm,
)


@triton.jit
def exponential_kernel(h_ptr, e_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(e_ptr + i, exponential(tl.load(h_ptr + i)))


def run_exponential(h: np.ndarray) -> np.ndarray:
    inputs = torch.from_numpy(h)
    output = torch.full_like(inputs, torch.nan)
    exponential_kernel[(1,)](inputs, output, BLOCK=len(h))
    return output.numpy()


@triton.jit
def exponentials_kernel(
    x_ptr, e_ptr, expm1_ptr, phi_ptr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e, less_one, phi = exponentials(0.5 * tl.load(x_ptr + i), BOUNDED)
    tl.store(e_ptr + i, e)
    tl.store(expm1_ptr + i, expm1_of_double(less_one))
    tl.store(phi_ptr + i, phi)


def run(x: np.ndarray, bounded: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs = torch.from_numpy(x)
    outputs = [torch.full_like(inputs, torch.nan) for _ in range(3)]
    exponentials_kernel[(1,)](inputs, *outputs, BOUNDED=bounded, BLOCK=len(x))
    return tuple(t.numpy() for t in outputs)


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """e**(x/2), expm1(x) and phi(x), correctly rounded to float64."""
    with mpmath.workdps(60):
        values = [mpmath.mpf(float(v)) for v in x]
        rows = [(mpmath.exp(v / 2), mpmath.expm1(v), mpmath.exp(v) - 1 - v) for v in values]
        return tuple(np.array([float(row[i]) for row in rows]) for i in range(3))


def ulps(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.abs(got.astype(np.float64) - truth) / np.spacing(
        np.abs(truth.astype(got.dtype))
    ).astype(np.float64)


def magnitudes(dtype: type, highest: float) -> np.ndarray:
    x = np.geomspace(1e-8, highest, 2048)
    return np.concatenate([x, -x]).astype(dtype)


@pytest.mark.parametrize("bounded", [False, True])
def test_phi_is_within_4_ulp_and_never_negative(bounded: bool) -> None:
    x = magnitudes(np.float32, 80.0)
    e, expm1, phi = run(x, bounded)
    true_e, true_expm1, true_phi = exact(x)
    assert (phi >= 0).all()
    assert ulps(phi, true_phi).max() <= 4
    assert ulps(e, true_e).max() <= 2
    assert ulps(expm1, true_expm1).max() <= 4


def test_float64_is_within_a_few_ulp_of_its_own() -> None:
    x = magnitudes(np.float64, 600.0)
    e, expm1, phi = run(x, False)
    true_e, true_expm1, true_phi = exact(x)
    assert (phi >= 0).all()
    for got, truth in ((e, true_e), (expm1, true_expm1), (phi, true_phi)):
        assert np.max(np.abs(got - truth) / np.abs(truth)) < 1.5e-15


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_range(dtype: type) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([inf, -inf, nan, 1e30, -1e30, -1500.0, 3000.0, 0.0], dtype=dtype)
    with np.errstate(all="ignore"):
        e, expm1, phi = run(x, False)
    np.testing.assert_array_equal(e, np.array([inf, 0, nan, inf, 0, 0, inf, 1], dtype))
    np.testing.assert_array_equal(expm1, np.array([inf, -1, nan, inf, -1, -1, inf, 0], dtype))
    expected = np.array([inf, inf, nan, inf, 1e30, 1499.0, inf, 0], dtype)
    np.testing.assert_allclose(phi, expected, rtol=1e-6)


def test_the_standard_deviation_reaches_to_the_largest_float32() -> None:
    x = np.linspace(170.0, 177.4, 64).astype(np.float32)
    e, _, _ = run(x, False)
    true_e, _, _ = exact(x)
    assert np.max(np.abs(e / true_e - 1)) < 1e-6


@pytest.mark.parametrize(("dtype", "highest"), [(np.float32, 87.0), (np.float64, 700.0)])
def test_a_lone_exponential_is_as_good(dtype: type, highest: float) -> None:
    h = magnitudes(dtype, highest)
    true_e, _, _ = exact(2 * h)
    assert ulps(run_exponential(h), true_e).max() <= 2
    inf, nan = np.inf, np.nan
    ends = np.array([inf, -inf, nan, 1e30, -1e30, -1500.0, 1500.0, 0.0], dtype=dtype)
    with np.errstate(all="ignore"):
        got = run_exponential(ends)
    np.testing.assert_array_equal(got, np.array([inf, 0, nan, inf, 0, 0, inf, 1], dtype))


@triton.jit
def logarithm_kernel(v_ptr, log_ptr, FRACTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + i)
    if FRACTION:
        tl.store(log_ptr + i, log1p_of_fraction(v))
    else:
        tl.store(log_ptr + i, logarithm(v))


def run_logarithm(v: np.ndarray, fraction: bool = False) -> np.ndarray:
    inputs = torch.from_numpy(v)
    output = torch.full_like(inputs, torch.nan)
    logarithm_kernel[(1,)](inputs, output, FRACTION=fraction, BLOCK=len(v))
    return output.numpy()


def exact_log(v: np.ndarray, added: int = 0) -> np.ndarray:
    with mpmath.workdps(60):
        return np.array([float(mpmath.log(added + mpmath.mpf(float(x)))) for x in v])


@pytest.mark.parametrize(("dtype", "lowest"), [(np.float32, 1e-44), (np.float64, 1e-323)])
def test_logarithms_are_within_a_few_ulp_also_near_1(dtype: type, lowest: float) -> None:
    every_magnitude = np.geomspace(lowest, float(np.finfo(dtype).max), 2048)
    near = 1.0 + np.concatenate([s * np.geomspace(1e-15, 0.5, 512) for s in (1, -1)])
    around_the_seam = np.sqrt(0.5) * (1 + np.linspace(-1e-3, 1e-3, 1024))
    v = np.concatenate([every_magnitude, near, around_the_seam]).astype(dtype)
    truth = exact_log(v)
    got = run_logarithm(v)
    assert (got[truth == 0] == 0).all()
    v, got, truth = v[truth != 0], got[truth != 0], truth[truth != 0]
    assert ulps(got, truth).max() <= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logarithms_of_1_plus_a_fraction_keep_small_fractions(dtype: type) -> None:
    y = np.concatenate([np.geomspace(1e-30, 1.0, 1024), np.linspace(0.3, 1.0, 1024)]).astype(dtype)
    assert ulps(run_logarithm(y, fraction=True), exact_log(y, added=1)).max() <= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_logarithm(dtype: type) -> None:
    ends = np.array([0.0, np.inf, np.nan, 1.0], dtype=dtype)
    expected = np.array([-np.inf, np.inf, np.nan, 0.0], dtype=dtype)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run_logarithm(ends), expected)
