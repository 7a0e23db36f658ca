"""Reconstruction terms that are no likelihoods, and what they make of the ELBO."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey, gaussian_log_likelihood
from fused_vae import (
    VAE,
    GaussianLikelihood,
    PerceptualDistortion,
    SSIMDistortion,
    compose,
    mlp_decoder,
    mlp_encoder,
)
from fused_vae.errors import UserError

KEY = NoiseKey(2)
IMAGE = (1, 16, 13)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(5, *IMAGE, generator=g)
    return (x + 0.2 * torch.randn(x.shape, generator=g)).clamp(0, 1), x


class Pyramid(nn.Module):
    """Two feature maps, the second coarser."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x)
        return [first, self.second(first.relu())]


def test_ssim_is_that_of_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    """Away from the borders; there torchmetrics mirrors the picture, which is done by hand here."""
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    values = SSIMDistortion()(*pair)
    assert values.shape == (5,)
    for row, (a, b) in enumerate(zip(*pair)):
        _, similarity = structural_similarity(
            *(np.pad(p[0].double().numpy(), 5, mode="reflect") for p in (a, b)),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        assert float(values[row]) == pytest.approx(1 - similarity[5:-5, 5:-5].mean(), abs=1e-5)
    assert float(SSIMDistortion()(pair[1], pair[1]).abs().max()) < 1e-6


def test_ssim_of_one_picture_is_a_batch_of_one(pair: tuple[Tensor, Tensor]) -> None:
    alone = SSIMDistortion()(pair[0][:1], pair[1][:1])
    torch.testing.assert_close(alone, SSIMDistortion()(*pair)[:1])


def test_ssim_without_torchmetrics_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def hidden(name: str, *rest: object) -> object:
        return None if name == "torchmetrics" else find(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(UserError, match=r"SSIMDistortion needs torchmetrics: pip install"):
        SSIMDistortion()


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    small = torch.zeros(2, 1, 8, 16)
    with pytest.raises(ValueError, match=r"H, W >= 11, got \(2, 1, 8, 16\)"):
        SSIMDistortion()(small, small)


def test_perceptual_distance_is_the_formula(pair: tuple[Tensor, Tensor]) -> None:
    features = Pyramid()
    values = PerceptualDistortion(features, (2.0, 0.5))(*pair)
    expected = torch.zeros(5)
    for weight, a, b in zip((2.0, 0.5), features(pair[0]), features(pair[1])):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        expected = expected + weight * (a - b).square().sum(1).mean((1, 2))
    torch.testing.assert_close(values, expected)
    plain = PerceptualDistortion(nn.Flatten())(*pair)  # one vector: 2 - 2 cos
    cosine = nn.functional.cosine_similarity(pair[0].flatten(1), pair[1].flatten(1))
    torch.testing.assert_close(plain, 2 - 2 * cosine, rtol=1e-4, atol=1e-6)


def test_perceptual_gradient_goes_to_the_reconstruction_alone() -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    distortion = PerceptualDistortion(features)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    recon = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: distortion(r, x.detach()), recon)
    distortion(recon, x).sum().backward()
    assert x.grad is None
    assert list(distortion.parameters()) == []


def test_perceptual_distance_refuses_what_does_not_fit(pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="one for each of the 2 features, got 1"):
        PerceptualDistortion(Pyramid(), [1.0])(*pair)
    with pytest.raises(ValueError, match="PerceptualDistortion: recon_x must have shape"):
        PerceptualDistortion(Pyramid())(pair[0][:1], pair[1])


def parts(pair: tuple[Tensor, Tensor]) -> tuple[VAE, Tensor, Tensor, Tensor]:
    """A model, and mean, log-likelihood and rate of one pass with gradients."""
    torch.manual_seed(0)
    likelihood = GaussianLikelihood("fixed", 0.3)
    vae = VAE(mlp_encoder(IMAGE, 3, (8,)), mlp_decoder(IMAGE, 3, (8,)), likelihood)
    z, kl = vae.sample_kl(pair[1], key=KEY)
    mean, logvar = vae.decode(z)
    return vae, mean, gaussian_log_likelihood(pair[1], mean, logvar), kl


def test_without_distortions_it_is_the_vae_itself(pair: tuple[Tensor, Tensor]) -> None:
    vae, _, log_likelihood, kl = parts(pair)
    composition = compose(kl, {}, log_likelihood=log_likelihood, beta=0.5)
    out = vae(pair[1], key=KEY, beta=0.5)
    torch.testing.assert_close(composition.loss, out.loss)
    torch.testing.assert_close(composition.elbo, out.elbo)
    parameters = list(vae.parameters())
    for a, b in zip(
        torch.autograd.grad(composition.loss, parameters), torch.autograd.grad(out.loss, parameters)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_terms_add_up_and_the_elbo_is_untouched(pair: tuple[Tensor, Tensor]) -> None:
    vae, mean, log_likelihood, kl = parts(pair)
    ssim, perceptual = (
        SSIMDistortion()(mean, pair[1]),
        PerceptualDistortion(Pyramid())(mean, pair[1]),
    )
    composition = compose(
        kl,
        {"ssim": (50.0, ssim), "perceptual": (10.0, perceptual)},
        log_likelihood=log_likelihood,
        beta=2.0,
    )
    expected = (2 * kl - log_likelihood + 50 * ssim + 10 * perceptual).mean()
    torch.testing.assert_close(composition.loss, expected)
    torch.testing.assert_close(composition.elbo, (log_likelihood - kl).detach())
    assert torch.equal(composition.distortions["ssim"], ssim.detach())
    assert not composition.distortions["perceptual"].requires_grad
    composition.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_without_a_likelihood_there_is_no_elbo_and_beta_is_an_inverse_weight(
    pair: tuple[Tensor, Tensor],
) -> None:
    _, mean, _, kl = parts(pair)
    d = SSIMDistortion()(mean, pair[1])
    composition = compose(kl, {"ssim": (4.0, d)}, beta=1.0)
    assert composition.elbo is None
    scaled = compose(kl, {"ssim": (1.0, d)}, beta=0.25)
    torch.testing.assert_close(composition.loss, 4 * scaled.loss)


def test_squared_error_as_a_distortion_is_the_unit_gaussian(pair: tuple[Tensor, Tensor]) -> None:
    """The one case in which a weight is a likelihood's: 1/2 per unit of summed squared error."""
    _, mean, _, kl = parts(pair)
    error = (mean - pair[1]).square().flatten(1).sum(1)
    a = compose(kl, {"squared error": (0.5, error)}).loss
    b = compose(kl, {}, log_likelihood=gaussian_log_likelihood(pair[1], mean)).loss
    gradients = [torch.autograd.grad(loss, mean, retain_graph=True)[0] for loss in (a, b)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bad_terms_are_refused() -> None:
    kl = torch.zeros(3)
    with pytest.raises(ValueError, match="needs a log_likelihood or at least one distortion"):
        compose(kl, {})
    with pytest.raises(ValueError, match="weight of d must be at least 0, got nan"):
        compose(kl, {"d": (float("nan"), kl)})
    with pytest.raises(ValueError, match=r"d must have shape \(3,\) like kl, got \(\)"):
        compose(kl, {"d": (1.0, kl.mean())})
