"""Fused kernels for the evidence lower bound of variational autoencoders.

    from fused_elbo import elbo_loss, reparameterize_kl

    z, kl = reparameterize_kl(mean, logvar)
    loss, log_likelihood, kl = elbo_loss(decoder(z), x, kl=kl)

Importing initializes no device; kernels are loaded on first use.
"""

from . import tracing
from .backends import available_backends, explain, use_backend
from .functional import (
    ELBOOutput,
    elbo_loss,
    gaussian_kl,
    gaussian_log_likelihood,
    reparameterize,
    reparameterize_kl,
)
from .gaussian import DiagonalGaussian
from .modules import ELBOLoss, GaussianLogLikelihood, Reparameterize
from .noise import NoiseKey
from .parametrization import Parametrization

__version__ = "0.1.0"

__all__ = [
    "DiagonalGaussian",
    "ELBOLoss",
    "ELBOOutput",
    "GaussianLogLikelihood",
    "NoiseKey",
    "Parametrization",
    "Reparameterize",
    "__version__",
    "available_backends",
    "elbo_loss",
    "explain",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "reparameterize",
    "reparameterize_kl",
    "tracing",
    "use_backend",
]
