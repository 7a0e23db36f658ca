"""Errors: exact text, naming function, argument, expected and got, before anything runs."""

import re

import pytest
import torch

from fused_elbo import (
    DiagonalGaussian,
    ELBOLoss,
    GaussianLogLikelihood,
    NoiseKey,
    Reparameterize,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
    use_backend,
)

A, B = torch.zeros(64, 32), torch.zeros(64, 16)
INT, EMPTY, ZERO_DIM = torch.zeros(64, 32, dtype=torch.int64), torch.zeros(0, 32), torch.zeros(())
COMPLEX = torch.zeros(64, 32, dtype=torch.complex64)
META = torch.zeros(64, 32, device="meta")
DTYPES = "float32, float64, bfloat16 or float16"
ALL = '"none", "sample", "sum", "batchmean"'
MEAN_HINT = '("batchmean" is the mean over the batch of the sum over each event)'

# fmt: off
CASES = [
    # reparameterize_kl, reparameterize, gaussian_kl: one path, so each case is tried once
    (lambda: reparameterize_kl(A, B), ValueError,
     "reparameterize_kl: logvar must have shape (64, 32) like mean, got (64, 16)"),
    (lambda: reparameterize(A, B), ValueError,
     "reparameterize: logvar must have shape (64, 32) like mean, got (64, 16)"),
    (lambda: gaussian_kl(A, B), ValueError,
     "gaussian_kl: logvar must have shape (64, 32) like mean, got (64, 16)"),
    (lambda: reparameterize_kl([1.0], A), TypeError,
     "reparameterize_kl: mean must be a tensor, got list"),
    (lambda: reparameterize_kl(A, 1.0), TypeError,
     "reparameterize_kl: logvar must be a tensor, got float"),
    (lambda: reparameterize_kl(A, None), TypeError,
     "reparameterize_kl: logvar must be a tensor, got NoneType"),
    (lambda: reparameterize_kl(INT, A), TypeError,
     f"reparameterize_kl: mean must be {DTYPES}, got int64"),
    (lambda: gaussian_kl(A, COMPLEX), TypeError,
     f"gaussian_kl: logvar must be {DTYPES}, got complex64"),
    (lambda: gaussian_kl(ZERO_DIM, ZERO_DIM), ValueError,
     "gaussian_kl: mean must have a batch dimension, got a 0-dim tensor"),
    (lambda: reparameterize_kl(A, META), ValueError,
     "reparameterize_kl: logvar must be on cpu like mean, got a tensor on meta"),
    (lambda: reparameterize_kl(A, A, B), ValueError,
     "reparameterize_kl: prior_mean must broadcast to the shape (64, 32) of mean, got (64, 16)"),
    (lambda: gaussian_kl(A, A, A, torch.zeros(2, 64, 32)), ValueError,
     "gaussian_kl: prior_logvar must broadcast to the shape (64, 32) of mean, got (2, 64, 32)"),
    (lambda: gaussian_kl(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(4, 3)), ValueError,
     "gaussian_kl: prior_mean must broadcast to the shape (1, 3) of mean, got (4, 3)"),
    (lambda: gaussian_kl(A, A, 0.0), TypeError,
     "gaussian_kl: prior_mean must be a tensor, got float"),
    (lambda: gaussian_kl(A, A, None, META), ValueError,
     "gaussian_kl: prior_logvar must be on cpu like mean, got a tensor on meta"),
    (lambda: reparameterize_kl(A, A, reduction="mean"), ValueError,
     f"reparameterize_kl: reduction must be one of {ALL}, got 'mean' {MEAN_HINT}"),
    (lambda: gaussian_kl(A, A, reduction=None), ValueError,
     f"gaussian_kl: reduction must be one of {ALL}, got None"),
    (lambda: gaussian_kl(A, A, reduction=["sum"]), ValueError,
     f"gaussian_kl: reduction must be one of {ALL}, got ['sum']"),
    (lambda: reparameterize(A, A, num_samples=0), ValueError,
     "reparameterize: num_samples must be at least 1, got 0"),
    (lambda: reparameterize(A, A, num_samples=2.0), TypeError,
     "reparameterize: num_samples must be an integer or None, got float"),
    (lambda: reparameterize(A, A, num_samples=True), TypeError,
     "reparameterize: num_samples must be an integer or None, got bool"),
    (lambda: reparameterize(A, A, key=3), TypeError,
     "reparameterize: key must be a fused_elbo.NoiseKey, got int (NoiseKey(seed) makes one)"),
    (lambda: reparameterize(A, A, key=NoiseKey(1), generator=torch.Generator()), ValueError,
     "reparameterize: give either key or generator, not both: a key already fixes the noise"),
    (lambda: reparameterize(A, A, generator=7), TypeError,
     "reparameterize: generator must be a torch.Generator, got int"),
    (lambda: reparameterize(A, A, key=NoiseKey(torch.tensor(1, device="meta"))), ValueError,
     "reparameterize: key.seed must be on cpu like mean, got a tensor on meta"),
    (lambda: reparameterize(A, A, backend="tpu"), ValueError,
     "fused_elbo: unknown backend 'tpu', expected one of 'cpu', 'cuda', 'triton', 'reference'"),

    (lambda: NoiseKey(1.0), TypeError, "NoiseKey: seed must be an integer, got float"),
    (lambda: NoiseKey(2**64), ValueError,
     f"NoiseKey: seed must be in [{-2**63}, {2**64}), got {2**64}"),
    (lambda: NoiseKey(-(2**63) - 1), ValueError,
     f"NoiseKey: seed must be in [{-2**63}, {2**64}), got {-2**63 - 1}"),
    (lambda: NoiseKey(torch.zeros(())), TypeError,
     "NoiseKey: a seed tensor must be int64, got torch.float32"),
    (lambda: NoiseKey(torch.zeros(2, dtype=torch.int64)), ValueError,
     "NoiseKey: a seed tensor must be 0-dim, got shape (2,)"),
    (lambda: NoiseKey(0, stream=-1), ValueError,
     f"NoiseKey: stream must be in [0, {2**32}), got -1"),
    (lambda: NoiseKey(0, stream=2**32), ValueError,
     f"NoiseKey: stream must be in [0, {2**32}), got {2**32}"),
    (lambda: NoiseKey(0, row_offset=-1), ValueError,
     f"NoiseKey: row_offset must be in [0, {2**63}), got -1"),
    (lambda: NoiseKey(0).rows(-1), ValueError, f"NoiseKey: start must be in [0, {2**63}), got -1"),
    (lambda: NoiseKey(0).rows(1.5), TypeError, "NoiseKey: start must be an integer, got float"),
    (lambda: NoiseKey(0).fold_in("a"), TypeError, "NoiseKey: data must be an integer, got str"),
    (lambda: NoiseKey(0).fold_in(2**64), ValueError,
     f"NoiseKey: data must be in [{-2**63}, {2**64}), got {2**64}"),

    (lambda: gaussian_log_likelihood(B, A), ValueError,
     "gaussian_log_likelihood: x must have shape (64, 32) like mean (one of them may have a "
     "leading sample dimension "
     "more), got (64, 16)"),
    (lambda: gaussian_log_likelihood(torch.zeros(64, 1), A), ValueError,
     "gaussian_log_likelihood: x must have shape (64, 32) like mean (one of them may have a "
     "leading sample dimension "
     "more), got (64, 1)"),
    (lambda: gaussian_log_likelihood(1.0, A), TypeError,
     "gaussian_log_likelihood: x must be a tensor, got float"),
    (lambda: gaussian_log_likelihood(A, INT), TypeError,
     f"gaussian_log_likelihood: mean must be {DTYPES}, got int64"),
    (lambda: gaussian_log_likelihood(A, META), ValueError,
     "gaussian_log_likelihood: x must be on meta like mean, got a tensor on cpu"),
    (lambda: gaussian_log_likelihood(ZERO_DIM, A), ValueError,
     "gaussian_log_likelihood: x must have a batch dimension, got a 0-dim tensor"),
    (lambda: gaussian_log_likelihood(A, A, B), ValueError,
     "gaussian_log_likelihood: logvar must broadcast to the shape (64, 32) of mean, got (64, 16)"),
    (lambda: gaussian_log_likelihood(A, A, "0"), TypeError,
     "gaussian_log_likelihood: logvar must be a number or a tensor, got str"),
    (lambda: gaussian_log_likelihood(A, A, True), TypeError,
     "gaussian_log_likelihood: logvar must be a number or a tensor, got bool"),
    (lambda: gaussian_log_likelihood(A, A, float("nan")), ValueError,
     "gaussian_log_likelihood: logvar must not be NaN"),
    (lambda: gaussian_log_likelihood(A, A, INT), TypeError,
     f"gaussian_log_likelihood: logvar must be {DTYPES}, got int64"),
    (lambda: gaussian_log_likelihood(A, A, META), ValueError,
     "gaussian_log_likelihood: logvar must be on cpu like mean, got a tensor on meta"),
    (lambda: gaussian_log_likelihood(A, A, reduction="avg"), ValueError,
     f"gaussian_log_likelihood: reduction must be one of {ALL}, got 'avg'"),

    (lambda: elbo_loss(A, B, A, A), ValueError,
     "elbo_loss: x must have shape (64, 32) like recon_x, got (64, 16)"),
    (lambda: elbo_loss(A, A), ValueError, "elbo_loss: give mean and logvar, or kl"),
    (lambda: elbo_loss(A, A, A), ValueError, "elbo_loss: give mean and logvar, or kl"),
    (lambda: elbo_loss(A, A, A, A, kl=torch.zeros(64)), ValueError,
     "elbo_loss: give either mean and logvar, or kl, not both"),
    (lambda: elbo_loss(A, A, kl=torch.zeros(())), ValueError,
     "elbo_loss: kl must have shape (64,), one value per sample as reduction='sample' gives, got "
     "()"),
    (lambda: elbo_loss(A, A, kl=3.0), TypeError, "elbo_loss: kl must be a tensor, got float"),
    (lambda: elbo_loss(A, A, kl=torch.zeros(64, device="meta")), ValueError,
     "elbo_loss: kl must be on cpu like recon_x, got a tensor on meta"),
    (lambda: elbo_loss(A, A, torch.zeros(63, 4), torch.zeros(63, 4)), ValueError,
     "elbo_loss: mean must have batch size 64 like recon_x, got 63"),
    (lambda: elbo_loss(A, A, A, B), ValueError,
     "elbo_loss: logvar must have shape (64, 32) like mean, got (64, 16)"),
    (lambda: elbo_loss(A, A, META, META), ValueError,
     "elbo_loss: mean must be on cpu like recon_x, got a tensor on meta"),
    (lambda: elbo_loss(A, A, A, A, recon_logvar=B), ValueError,
     "elbo_loss: recon_logvar must broadcast to the shape (64, 32) of recon_x, got (64, 16)"),
    (lambda: elbo_loss(A, A, A, A, recon_logvar="x"), TypeError,
     "elbo_loss: recon_logvar must be a number or a tensor, got str"),
    (lambda: elbo_loss(A, A, A, A, beta=torch.zeros(64)), ValueError,
     "elbo_loss: beta must be a number or a 0-dim tensor, got shape (64,)"),
    (lambda: elbo_loss(A, A, A, A, beta=None), TypeError,
     "elbo_loss: beta must be a number or a tensor, got NoneType"),
    (lambda: elbo_loss(A, A, A, A, beta=float("nan")), ValueError,
     "elbo_loss: beta must not be NaN"),
    (lambda: elbo_loss(A, A, A, A, beta=torch.zeros((), device="meta")), ValueError,
     "elbo_loss: beta must be on cpu like recon_x, got a tensor on meta"),
    (lambda: elbo_loss(A, A, A, A, reduction="none"), ValueError,
     'elbo_loss: reduction must be one of "batchmean", "sum", "sample", got \'none\''),
    (lambda: elbo_loss(A, A, A, A, reduction="mean"), ValueError,
     f'elbo_loss: reduction must be one of "batchmean", "sum", "sample", got \'mean\' {MEAN_HINT}'),

    (lambda: DiagonalGaussian(A, B), ValueError,
     "DiagonalGaussian: logvar must have shape (64, 32) like mean, got (64, 16)"),
    (lambda: DiagonalGaussian.from_moments(3), TypeError,
     "DiagonalGaussian.from_moments: moments must be a tensor, got int"),
    (lambda: DiagonalGaussian.from_moments(torch.zeros(2, 3)), ValueError,
     "DiagonalGaussian.from_moments: moments must have an even size in dimension 1, got (2, 3)"),
    (lambda: DiagonalGaussian.from_moments(A, dim=0), ValueError,
     "DiagonalGaussian.from_moments: dim must be a dimension of moments (64, 32) other than the "
     "batch, got 0"),
    (lambda: DiagonalGaussian.from_moments(A, dim=2), ValueError,
     "DiagonalGaussian.from_moments: dim must be a dimension of moments (64, 32) other than the "
     "batch, got 2"),
    (lambda: DiagonalGaussian.from_moments(A, dim=-2), ValueError,
     "DiagonalGaussian.from_moments: dim must be a dimension of moments (64, 32) other than the "
     "batch, got -2"),
    (lambda: DiagonalGaussian.from_moments(A, clamp=(1.0, 0.0)), ValueError,
     "DiagonalGaussian.from_moments: clamp must be (low, high) with low <= high, got (1.0, 0.0)"),
    (lambda: DiagonalGaussian(A, A).kl(3), TypeError,
     "DiagonalGaussian.kl: other must be a DiagonalGaussian or None, got int"),
    (lambda: DiagonalGaussian(A, A).kl(DiagonalGaussian(B, B)), ValueError,
     "DiagonalGaussian.kl: prior_mean must broadcast to the shape (64, 32) of mean, got (64, 16)"),
    (lambda: DiagonalGaussian(A, A).rsample(0), ValueError,
     "DiagonalGaussian.rsample: num_samples must be at least 1, got 0"),
    (lambda: DiagonalGaussian(A, A).sample_kl(reduction="mean"), ValueError,
     f"DiagonalGaussian.sample_kl: reduction must be one of {ALL}, got 'mean' {MEAN_HINT}"),
    (lambda: DiagonalGaussian(A, A).rsample(backend="tpu"), ValueError,
     "fused_elbo: unknown backend 'tpu', expected one of 'cpu', 'cuda', 'triton', 'reference'"),

    (lambda: Reparameterize(num_samples=-1), ValueError,
     "Reparameterize: num_samples must be at least 1, got -1"),
    (lambda: Reparameterize(reduction="mean"), ValueError,
     f"Reparameterize: reduction must be one of {ALL}, got 'mean' {MEAN_HINT}"),
    (lambda: GaussianLogLikelihood("unit"), TypeError,
     "GaussianLogLikelihood: logvar must be a number or a tensor, got str"),
    (lambda: ELBOLoss(beta="1"), TypeError, "ELBOLoss: beta must be a number or a tensor, got str"),
    (lambda: ELBOLoss(reduction="none"), ValueError,
     'ELBOLoss: reduction must be one of "batchmean", "sum", "sample", got \'none\''),
    (lambda: use_backend("tpu").__enter__(), ValueError,
     "fused_elbo: unknown backend 'tpu', expected one of 'cpu', 'cuda', 'triton', 'reference'"),
]
# fmt: on


@pytest.mark.parametrize(("call", "error", "text"), CASES, ids=[text[:90] for _, _, text in CASES])
def test_a_bad_argument_is_named_before_anything_runs(call, error, text):
    before = torch.get_rng_state()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        pytest.raises(error, match=f"^{re.escape(text)}$"),
    ):
        call()
    assert torch.equal(torch.get_rng_state(), before), "a seed was drawn for a call that failed"
    ran = {event.name for event in profile.events()}
    assert not [name for name in ran if "fused_elbo" in name or "copy" in name]
