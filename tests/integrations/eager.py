"""What other code bases define for themselves, in plain PyTorch."""

from __future__ import annotations

import math

import torch


class DiagonalGaussianDistribution:
    """The posterior of latent-diffusion, with the methods and attributes that its users know."""

    def __init__(self, parameters, deterministic=False):
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self):
        return self.mean + self.std * torch.randn_like(self.mean)

    def kl(self, other=None):
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() / other.var
            terms = distance + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=[1, 2, 3])

    def nll(self, sample, dims=(1, 2, 3)):
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))

    def mode(self):
        return self.mean


def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    squares = torch.exp(2.0 * logsigma1) + (mu1 - mu2).square()
    return logsigma2 - logsigma1 - 0.5 + 0.5 * squares * torch.exp(-2.0 * logsigma2)


def draw_gaussian_diag_samples(mu, logsigma):
    return mu + torch.exp(logsigma) * torch.randn_like(mu)


def kl_loss(z_p, logs_q, m_p, logs_p, z_mask):
    terms = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p).square() * torch.exp(-2.0 * logs_p)
    return (terms * z_mask).sum() / z_mask.sum()
