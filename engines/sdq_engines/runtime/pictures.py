"""Images and masks that a caller hands in, as the model takes them.

What diffusers' `VaeImageProcessor` does for a PIL image: resized by Lanczos where the size differs, 8 bits to [-1, 1];
masks to grey, and painted where they are half white or more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pictured", "mask_pixels", "one_each", "open_picture", "pixels"]

#: What stands for an image: a PIL image, an array [H, W, 3] uint8 (a mask: [H, W], uint8 or bool), or a file's path.
Pictured = Any

_logger = logging.getLogger(__name__)


def one_each(pictured: Pictured | Sequence[Pictured], prompts: int, what: str) -> list[Pictured]:
    """One of them for each prompt: a list as it is, a single one again and again.

    Raises:
        SdqError: a list of another length.
    """
    if not isinstance(pictured, list | tuple):
        return [pictured] * prompts
    if len(pictured) != prompts:
        raise SdqError(
            f"{len(pictured)} {what}s were given for {prompts} prompts.", f"Give one {what} for all, or one each."
        )
    return list(pictured)


def open_picture(pictured: Pictured, what: str) -> Image:
    """The image behind whatever was handed in.

    Args:
        pictured: see `Pictured`.
        what: "image" or "mask_image", for messages.

    Raises:
        SdqError: a file that is not there or is no image, an array of another shape or type, another kind of thing.
    """
    from PIL import Image as images

    if isinstance(pictured, images.Image):
        return pictured
    if isinstance(pictured, np.ndarray):
        return images.fromarray(_checked(pictured, what))
    if isinstance(pictured, str | Path):
        return _read(Path(pictured), what)
    raise SdqError(
        f"{what} is a {type(pictured).__name__}; a PIL image, an array or a file's path is wanted.",
        f"For example {what}='photo.png'.",
    )


def pixels(picture: Image, size: tuple[int, int]) -> np.ndarray:
    """FP32 [3, height, width] in [-1, 1]; `size` is (height, width)."""
    scaled = _resized(picture.convert("RGB"), size, "image")
    return (2.0 * (np.asarray(scaled, np.float32) / 255.0) - 1.0).transpose(2, 0, 1)


def mask_pixels(picture: Image, size: tuple[int, int]) -> np.ndarray:
    """FP32 [1, height, width]: 1 where to paint, 0 where to keep."""
    scaled = _resized(picture.convert("L"), size, "mask")
    return (np.asarray(scaled, np.float32) / 255.0 >= 0.5).astype(np.float32)[None]


def _resized(picture: Image, size: tuple[int, int], what: str) -> Image:
    from PIL import Image as images

    height, width = size
    if picture.size == (width, height):
        return picture
    _logger.warning(
        "The %s is %dx%d; it was resized to %dx%d, the size that is made.", what, *picture.size, width, height
    )
    return picture.resize((width, height), images.Resampling.LANCZOS)


def _checked(array: np.ndarray, what: str) -> np.ndarray:
    if what == "mask_image":
        fits, wanted = array.ndim == 2 and array.dtype in (np.uint8, np.bool_), "[H, W] of uint8 or bool"
    else:
        fits, wanted = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8, "[H, W, 3] of uint8"
    if not fits or not array.size:
        raise SdqError(
            f"{what} is an array {list(array.shape)} of {array.dtype}; {wanted} is wanted.",
            "An array in [0, 1] becomes one by (255 * array).round().astype('uint8').",
        )
    return np.ascontiguousarray(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array)


def _read(path: Path, what: str) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    if not path.is_file():
        raise SdqError(f"{what}: there is no file {path}.")
    try:
        with images.open(path) as opened:
            # A camera's orientation is in its metadata; transposing also reads the file, so that damage shows here.
            return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        raise SdqError(
            f"{what}: {path} is not an image that can be read: {error}.", "PNG, JPEG and WebP are."
        ) from error
