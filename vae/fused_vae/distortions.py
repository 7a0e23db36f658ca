"""Reconstruction terms beside the Gaussian likelihood, and how they join the ELBO.

A *distortion* is any function d(recon_x, x) -> ``[B]``, least where the two agree. Structural
similarity and perceptual distances are not log-likelihoods: exp(-weight d) has no normalizer that
anybody knows, and the one it has depends on z. So what is trained with them is

    loss = mean of -log p(x|z) + sum_i weight_i d_i(recon_x, x) + beta KL(q(z|x) || p(z))

whose weights are prices in nats per unit of d_i, and no bound on log p(x). It still walks along a
rate-distortion curve, with slope -beta / weight_i in units of d_i per nat where d_i is all there is
(arXiv:1711.00464): there a beta is nothing but the inverse of a weight, "beta = 1" means nothing,
and values of different weights or maps cannot be compared. `Composition.elbo` stays the bound of
the likelihood alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import wide
from .errors import missing_package

SSIM_WINDOW = 11
"""Pixels of the Gaussian window, sigma 1.5 (Wang et al., IEEE Trans. Image Processing 13, 2004)."""


class Composition(NamedTuple):
    """What is optimized, and what is logged."""

    loss: Tensor  # []
    elbo: Tensor | None  # [B] nats, detached; None where there is no log-likelihood
    distortions: dict[str, Tensor]  # [B] each, in its own unit, unweighted, detached


def compose(
    kl: Tensor,
    distortions: Mapping[str, tuple[float, Tensor]],
    *,
    log_likelihood: Tensor | None = None,
    beta: float = 1.0,
) -> Composition:
    """The ELBO with further terms, or with others in the place of its likelihood.

    Args:
        kl: ``[B]`` nats, e.g. of ``vae.sample_kl``.
        distortions: name -> (nats per unit, ``[B]`` values with gradient).
        log_likelihood: ``[B]`` nats. None: the distortions alone say what a good reconstruction is.
        beta: weight of the KL.

    Raises:
        ValueError: nothing to reconstruct for, a weight below 0, a term that is not per sample.
    """
    if log_likelihood is None and not distortions:
        raise ValueError("compose: needs a log_likelihood or at least one distortion, got neither")
    for name, (weight, values) in distortions.items():
        if not weight >= 0:
            raise ValueError(f"compose: weight of {name} must be at least 0, got {weight}")
        if values.shape != kl.shape:
            raise ValueError(
                f"compose: {name} must have shape {tuple(kl.shape)} like kl, got "
                f"{tuple(values.shape)}"
            )
    total = beta * kl
    if log_likelihood is not None:
        total = total - log_likelihood
    for weight, values in distortions.values():
        total = total + weight * values
    elbo = None if log_likelihood is None else (log_likelihood - kl).detach()
    return Composition(total.mean(), elbo, {k: v.detach() for k, (_, v) in distortions.items()})


class SSIMDistortion(nn.Module):
    """1 - SSIM, from 0 (equal) to 2, no unit; with torchmetrics.

    Args:
        data_range: largest minus least value that a pixel may have.

    Raises:
        UserError: torchmetrics is not installed.
    """

    def __init__(self, data_range: float = 1.0) -> None:
        super().__init__()
        if importlib.util.find_spec("torchmetrics") is None:
            raise missing_package("torchmetrics", "SSIMDistortion")
        self.data_range = data_range

    def forward(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` twice -> ``[B]``.

        Raises:
            ValueError: shapes that differ, or pictures smaller than the window of 11 pixels.
        """
        from torchmetrics.functional.image import structural_similarity_index_measure

        _pair("SSIMDistortion", recon_x, x)
        if x.dim() != 4 or min(x.shape[2:]) < SSIM_WINDOW:
            raise ValueError(
                f"SSIMDistortion: x must have shape [B, C, H, W] with H, W >= {SSIM_WINDOW}, got "
                f"{tuple(x.shape)}"
            )
        similarity = structural_similarity_index_measure(
            wide(recon_x), wide(x), sigma=1.5, reduction="none", data_range=self.data_range
        )
        assert isinstance(similarity, Tensor)
        return 1 - similarity.reshape(len(x))


class PerceptualDistortion(nn.Module):
    """Distance in the features of a network that you supply (arXiv:1801.03924, with the weights of
    its layers given, not learned); no unit.

        d = sum_l weight_l mean over positions of |f_l(recon_x) - f_l(x)|^2

    where each f_l is scaled to unit length over its channels, so that d_l lies in [0, 4].

    Args:
        features: maps ``[B, C, H, W]`` to one tensor ``[B, channels, *positions]`` or to several.
            It is run as it is: put it into eval mode, and its parameters on requires_grad=False
            unless they are to be trained. It is not saved with the model that is trained.
        weights: one for each tensor. None: 1 for each.
    """

    def __init__(self, features: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self._features = (features,)  # in a tuple, so that it is no submodule
        self.weights = None if weights is None else tuple(weights)

    def forward(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """``[B, *event]`` twice -> ``[B]``; the gradient goes to `recon_x` alone.

        Raises:
            ValueError: shapes that differ, another number of features than of weights.
        """
        _pair("PerceptualDistortion", recon_x, x)
        with torch.no_grad():
            targets = _several(self._features[0](x))
        found = _several(self._features[0](recon_x))
        weights = (1.0,) * len(found) if self.weights is None else self.weights
        if len(weights) != len(found):
            raise ValueError(
                f"PerceptualDistortion: weights must be one for each of the {len(found)} features,"
                f" got {len(weights)}"
            )
        terms = [
            weight * _unit_length(a).sub(_unit_length(b)).square().sum(1).flatten(1).mean(1)
            for weight, a, b in zip(weights, found, targets)
        ]
        return torch.stack(terms).sum(0)


def _unit_length(features: Tensor) -> Tensor:
    """[B, channels, *positions], at least one position."""
    if features.dim() == 2:
        features = features[..., None]
    return F.normalize(wide(features), dim=1, eps=1e-10)


def _several(features: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _pair(function: str, recon_x: Tensor, x: Tensor) -> None:
    if recon_x.shape != x.shape:
        raise ValueError(
            f"{function}: recon_x must have shape {tuple(x.shape)} like x, got "
            f"{tuple(recon_x.shape)}"
        )
