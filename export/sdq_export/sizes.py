"""Packages whose graphs take any size: what height and width are called, and what they are captured with."""

from __future__ import annotations

__all__ = ["HEIGHT", "IMAGE_HEIGHT", "IMAGE_WIDTH", "WIDTH", "different"]

#: Names of the free dimensions in the graphs' shapes: of latents, and of images in pixels.
HEIGHT, WIDTH = "height", "width"
IMAGE_HEIGHT, IMAGE_WIDTH = "image_height", "image_width"


def different(size: tuple[int, ...], multiple: int) -> tuple[int, int]:
    """An example (height, width) near ``size`` to capture with: tracing takes two equal sizes for one symbol.

    ``multiple`` 0 leaves the size as it is: nothing is free.
    """
    height, width = size
    return (height, width) if not multiple else (max(height, 2 * multiple), max(width, 2 * multiple) + multiple)
