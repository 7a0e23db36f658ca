"""A thin variational autoencoder on the fused operations of `fused_elbo`, and the ``fused-vae``
command line.
"""

from .model import VAE, GaussianLikelihood, VAEOutput
from .networks import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder

__all__ = [
    "VAE",
    "GaussianLikelihood",
    "VAEOutput",
    "conv_decoder",
    "conv_encoder",
    "mlp_decoder",
    "mlp_encoder",
]
