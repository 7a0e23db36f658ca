"""A training step of `fused_vae`, and the same step with the formula of the tutorials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fused_elbo

from . import formulas
from .workloads import Inputs, Workload

_LATENT = 32


class TrainingPass:
    """Forward: the loss. Backward: gradients and an Adam step. All have the same networks."""

    def __init__(self, workload: Workload, inputs: Inputs, provider: str) -> None:
        from fused_vae.model import VAE, GaussianLikelihood
        from fused_vae.networks import mlp_decoder, mlp_encoder

        torch.manual_seed(0)
        self.x = inputs["x"]
        image = workload.shape[1:]
        encoder, decoder = mlp_encoder(image, _LATENT), mlp_decoder(image, _LATENT)
        self.model = VAE(encoder, decoder, GaussianLikelihood("unit")).to(
            self.x.device, self.x.dtype
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.loss = _losses(self.model, provider)

    def forward(self) -> Any:
        return self.loss(self.x)

    def backward(self, outputs: Any) -> Any:
        outputs.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def inference(self) -> Any:
        return self.loss(self.x)


def offers(provider: str) -> bool:
    return provider in ("eager", "compile") or provider.startswith("fused-")


def _losses(model: nn.Module, provider: str) -> Any:
    def eager(x: Tensor) -> Tensor:
        mean, logvar = model.encoder(x).chunk(2, 1)
        z, kl = formulas.sample_and_kl(mean, logvar, 0)
        log_likelihood = formulas.log_likelihood(x, model.decoder(z), None, 1)
        return (kl - log_likelihood).mean()

    def fused(x: Tensor) -> Tensor:
        with fused_elbo.use_backend(provider.removeprefix("fused-")):
            return model(x).loss

    if provider == "compile":
        return torch.compile(eager, dynamic=False)
    return fused if provider.startswith("fused-") else eager
