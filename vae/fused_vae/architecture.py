"""The model that the options ``--network``, ``--flow`` and ``--prior`` describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fused_elbo import NoiseKey

from .data import Images
from .errors import UserError
from .flexible import FlexibleVAE
from .flows import Flow, PlanarFlow
from .hierarchy import HierarchicalVAE
from .iaf import InverseAutoregressiveFlow
from .likelihoods import GaussianLikelihood, Variance
from .model import VAE
from .networks import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder
from .priors import GaussianMixture, Prior, VampPrior
from .real_nvp import RealNVP

Model = VAE | HierarchicalVAE

NetworkName = Literal["conv", "mlp", "hierarchy"]
FlowName = Literal["none", "planar", "iaf"]
PriorName = Literal["standard", "mixture", "vamp", "real-nvp"]

PLANAR_LAYERS = 8
IAF_STEPS, IAF_HIDDEN = 2, 64
MIXTURE_COMPONENTS = 20
PSEUDO_INPUTS = 50


@dataclass(frozen=True)
class Architecture:
    """What the options say of a model, before there are images."""

    network: NetworkName = "conv"
    latents: tuple[int, ...] = (10,)  # dimensions of each stochastic layer, top first
    variance: Variance = "learned"
    sigma: float = 0.25
    flow: FlowName = "none"
    prior: PriorName = "standard"

    @property
    def flexible(self) -> bool:
        """Whether the rate is an estimate, with no share per dimension (`FlexibleVAE`)."""
        return self.flow != "none" or self.prior != "standard"

    @property
    def hierarchical(self) -> bool:
        """Whether there are several stochastic layers."""
        return self.network == "hierarchy"

    @property
    def prior_name(self) -> str:
        """As in formulas."""
        return "p(z)" if self.hierarchical or self.prior != "standard" else "N(0, I)"

    def describe(self) -> str:
        """For a person; the decoder's variance aside."""
        latent = sum(self.latents)
        if self.hierarchical:
            sizes = " + ".join(map(str, self.latents))
            return f"hierarchy, {latent} latent dimensions in layers of {sizes}"
        text = f"{self.network} networks, {latent} latent dimensions"
        if self.flow != "none":
            text += f", {self.flow} flow"
        return text if self.prior == "standard" else f"{text}, {self.prior} prior"

    def build(self, images: Images) -> Model:
        """The untrained model for pictures like these, the training pictures.

        Raises:
            UserError: the pictures are too small for the network.
        """
        likelihood = GaussianLikelihood(
            self.variance, self.sigma, bounded=True, floor=images.rounding_error
        )
        if self.hierarchical:
            return HierarchicalVAE(images.shape, self.latents, likelihood)
        make_encoder, make_decoder = (
            (conv_encoder, conv_decoder) if self.network == "conv" else (mlp_encoder, mlp_decoder)
        )
        (latent,) = self.latents
        try:
            encoder = make_encoder(images.shape, latent)
            decoder = make_decoder(images.shape, latent, outputs=likelihood.outputs)
        except ValueError as error:
            raise UserError(f"--network {self.network}: {error}") from error
        if not self.flexible:
            return VAE(encoder, decoder, likelihood)

        def context(outputs: int) -> nn.Module:
            network = make_encoder(images.shape, outputs // 2)
            last = network[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)  # every x starts with the same flow
            nn.init.zeros_(last.bias)
            return network

        flow: Flow | None = None
        if self.flow == "planar":
            size = PLANAR_LAYERS * (2 * latent + 1)
            flow = PlanarFlow(latent, PLANAR_LAYERS, context(size))
        elif self.flow == "iaf":
            hidden = max(IAF_HIDDEN, latent)
            size = IAF_STEPS * hidden
            flow = InverseAutoregressiveFlow(latent, IAF_STEPS, hidden, context(size))
        prior = self._prior(encoder, images, latent)
        return FlexibleVAE(encoder, decoder, likelihood, flow=flow, prior=prior)

    def _prior(self, encoder: nn.Module, images: Images, latent: int) -> Prior | None:
        if self.prior == "mixture":
            return GaussianMixture(latent, MIXTURE_COMPONENTS)
        if self.prior == "vamp":
            some = images.select(torch.arange(min(PSEUDO_INPUTS, len(images))))
            return VampPrior(encoder, some.dequantise(torch.Generator().manual_seed(0)))
        return RealNVP(latent) if self.prior == "real-nvp" else None


def sample(model: Model, count: int, latent: int, key: NoiseKey | None = None) -> Tensor:
    """``[count, *event]``: the mean of p(x|z) for z from the model's prior."""
    if isinstance(model, HierarchicalVAE):
        return model.sample(count, key=key)
    return model.sample(count, latent, key=key)
