"""Encoders and decoders: an MLP pair and a convolutional pair.

An encoder maps images to the moments of q(z|x), mean and log-variance side by side along dimension
1. A decoder maps z to ``outputs`` numbers per pixel: the mean of p(x|z), or its mean and log-
variance (see `GaussianLikelihood`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

ImageShape = tuple[int, int, int]
"""Channels, height, width."""


def mlp_encoder(
    image: ImageShape, latent: int, hidden: Sequence[int] = (512, 256)
) -> nn.Sequential:
    """[B, C, H, W] -> [B, 2 * latent]."""
    return nn.Sequential(nn.Flatten(), *_perceptron([prod(image), *hidden, 2 * latent]))


def mlp_decoder(
    image: ImageShape, latent: int, hidden: Sequence[int] = (512, 256), outputs: int = 1
) -> nn.Sequential:
    """[B, latent] -> [B, outputs * C, H, W]; `hidden` is written as for the encoder and read
    backwards.
    """
    channels, height, width = image
    return nn.Sequential(
        *_perceptron([latent, *reversed(hidden), outputs * prod(image)]),
        nn.Unflatten(1, (outputs * channels, height, width)),
    )


def _perceptron(sizes: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
    return layers[:-1]  # the last layer is linear


def conv_encoder(
    image: ImageShape, latent: int, widths: Sequence[int] = (32, 64), hidden: int = 256
) -> nn.Sequential:
    """[B, C, H, W] -> [B, 2 * latent]; each width is a convolution that halves height and width."""
    sizes = _halvings(image, len(widths))
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip([image[0], *widths], widths, strict=False):
        layers += [nn.Conv2d(fan_in, fan_out, kernel_size=4, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), *_perceptron([widths[-1] * prod(sizes[-1]), hidden, 2 * latent])
    )


def conv_decoder(
    image: ImageShape,
    latent: int,
    widths: Sequence[int] = (32, 64),
    hidden: int = 256,
    outputs: int = 1,
) -> nn.Sequential:
    """[B, latent] -> [B, outputs * C, H, W], the mirror image of `conv_encoder`."""
    sizes = _halvings(image, len(widths))
    layers: list[nn.Module] = [
        *_perceptron([latent, hidden, widths[-1] * prod(sizes[-1])]),
        nn.SiLU(),
        nn.Unflatten(1, (widths[-1], *sizes[-1])),
    ]
    channels = [*reversed(widths), outputs * image[0]]
    for stage, (fan_in, fan_out) in enumerate(zip(channels, channels[1:], strict=False)):
        height, width = sizes[-2 - stage]
        odd = (height % 2, width % 2)  # the row and column that halving rounded away
        layers += [nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1, output_padding=odd), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _halvings(image: ImageShape, stages: int) -> list[tuple[int, int]]:
    """Height and width before and after each stride-2 convolution."""
    sizes = [image[1:]]
    for _ in range(stages):
        height, width = sizes[-1]
        if min(height, width) < 2:
            raise ValueError(
                f"images of {image[1]}x{image[2]} pixels are too small to be halved {stages} times"
            )
        sizes.append((height // 2, width // 2))
    return sizes


def count_parameters(module: nn.Module) -> int:
    """How many numbers an optimizer would train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


__all__ = [
    "ImageShape",
    "conv_decoder",
    "conv_encoder",
    "count_parameters",
    "mlp_decoder",
    "mlp_encoder",
]
