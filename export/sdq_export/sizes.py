"""Packages whose graphs take any size: what height and width are called, and what they must be multiples of."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["HEIGHT", "IMAGE_HEIGHT", "IMAGE_WIDTH", "WIDTH", "different", "latent_multiple"]

#: Names of the free dimensions in the graphs' shapes: of latents, and of images in pixels.
HEIGHT, WIDTH = "height", "width"
IMAGE_HEIGHT, IMAGE_WIDTH = "image_height", "image_width"


def latent_multiple(unet: nn.Module) -> int:
    """What the latents' height and width must be multiples of: every level but the last halves them."""
    config: Any = unet.config
    return int(2 ** (len(config.block_out_channels) - 1))


def different(size: tuple[int, ...], multiple: int) -> tuple[int, int]:
    """An example (height, width) near ``size`` to capture with: tracing takes two equal sizes for one symbol.

    ``multiple`` 0 leaves the size as it is: nothing is free.
    """
    height, width = size
    return (height, width) if not multiple else (max(height, 2 * multiple), max(width, 2 * multiple) + multiple)
