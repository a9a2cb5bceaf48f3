"""Packages whose graphs take any size: what height and width are called, and what they are captured with."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["HEIGHT", "IMAGE_HEIGHT", "IMAGE_WIDTH", "WIDTH", "different"]

#: Names of the free dimensions in the graphs' shapes: of latents, and of images in pixels.
HEIGHT, WIDTH = "height", "width"
IMAGE_HEIGHT, IMAGE_WIDTH = "image_height", "image_width"


def different(size: Sequence[int], multiple: int, limit: int | None = None) -> tuple[int, int]:
    """An example (height, width) near ``size`` to capture with: tracing takes two equal sizes for one symbol.

    ``multiple`` 0 leaves the size as it is: nothing is free. ``limit`` is the most of either, and no example: where all
    of something is taken, tracing finds that nothing is cut.
    """
    height, width = size
    if not multiple:
        return height, width
    height, width = max(height, 2 * multiple), max(width, 2 * multiple) + multiple
    if limit is not None and max(height, width) >= limit:
        height = limit // (2 * multiple) * multiple
        width = height + multiple
    return height, width
