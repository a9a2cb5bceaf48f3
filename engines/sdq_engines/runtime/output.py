"""What a call of a pipeline gives back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sdq_engines.runtime.loop import LoopTime

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PipelineOutput", "as_images"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineOutput:
    """What one call made."""

    images: list[Image]
    latents: np.ndarray
    """FP32 [images, C, h, w], as the sampler ended, before the decoder."""
    seeds: list[int]
    """Of each image; each can be made again alone by its own."""
    loops: list[LoopTime] = field(default_factory=list, repr=False)
    """Where the time of each batch's loop went."""


def as_images(pixels: np.ndarray, engine: str) -> list[Image]:
    """Pictures of what a decoder made, as diffusers makes them: [0, 1] to 8 bits by rounding.

    Args:
        pixels: FP32 [batch, 3, height, width]. What is no number becomes black or white, and is warned of.
        engine: that made them, for the warning.
    """
    from PIL import Image as images

    if not np.isfinite(pixels).all():
        _logger.warning("The %s engine made pixels that are no numbers; such an image is not to be used.", engine)
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0)
    bytes_ = (pixels.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    return [images.fromarray(image) for image in bytes_]
