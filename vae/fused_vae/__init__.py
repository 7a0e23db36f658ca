"""A thin variational autoencoder on the fused operations of `fused_elbo`, and the ``fused-vae``
command line.
"""

from .distortions import PerceptualDistortion, SSIMDistortion, compose
from .flexible import FlexibleVAE
from .flows import PlanarFlow
from .hierarchy import HierarchicalVAE
from .iaf import InverseAutoregressiveFlow
from .likelihoods import GaussianLikelihood
from .model import VAE, VAEOutput
from .networks import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder
from .priors import GaussianMixture, VampPrior
from .real_nvp import RealNVP

__all__ = [
    "VAE",
    "FlexibleVAE",
    "GaussianLikelihood",
    "GaussianMixture",
    "HierarchicalVAE",
    "InverseAutoregressiveFlow",
    "PerceptualDistortion",
    "PlanarFlow",
    "RealNVP",
    "SSIMDistortion",
    "VAEOutput",
    "VampPrior",
    "compose",
    "conv_decoder",
    "conv_encoder",
    "mlp_decoder",
    "mlp_encoder",
]
