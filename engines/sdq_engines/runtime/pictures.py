"""Images and masks that a caller hands in, as the model takes them.

What diffusers' `VaeImageProcessor` does for a PIL image: resized by Lanczos where the size differs, 8 bits to [-1, 1];
masks to grey, and painted where they are half white or more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.errors import SdqError
from sdq_engines.runtime.bits import array_to_8_bits, image_to_8_bits

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pictured", "mask_pixels", "one_each", "open_picture", "pixels"]

#: What stands for an image: a PIL image, an array [H, W, 3] (or [H, W]; a mask: [H, W]), or a path. Of arrays and
#: images of more than 8 bits see `runtime.bits`.
Pictured = Any

_logger = logging.getLogger(__name__)


def one_each(pictured: Pictured | Sequence[Pictured], prompts: int, what: str) -> list[Pictured]:
    """One of them for each prompt: a list as it is, an array [N, H, W, 3] as a list, a single one again and again.

    Raises:
        SdqError: a list of another length.
    """
    if isinstance(pictured, np.ndarray) and pictured.ndim == 4:
        pictured = list(pictured)
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
        SdqError: a file that is not there or is no image, an array of another shape, values that may mean several
            things, another kind of thing.
    """
    from PIL import Image as images

    if isinstance(pictured, images.Image):
        _check_not_empty(pictured.size, what)
        return pictured
    if isinstance(pictured, np.ndarray):
        return images.fromarray(array_to_8_bits(_checked(pictured, what), what))
    if isinstance(pictured, str | os.PathLike):
        return _read(Path(pictured), what)
    raise SdqError(
        f"{what} is a {type(pictured).__name__}; a PIL image, an array or a file's path is wanted.",
        f"For example {what}='photo.png'.",
    )


def pixels(picture: Image, size: tuple[int, int]) -> np.ndarray:
    """FP32 [3, height, width] in [-1, 1]; `size` is (height, width)."""
    picture = image_to_8_bits(picture, "image")
    if _shows_through(picture):
        _logger.warning("The image is transparent in places; the colours that are stored there are used.")
    scaled = _resized(picture.convert("RGB"), size, "image")
    return (2.0 * (np.asarray(scaled, np.float32) / 255.0) - 1.0).transpose(2, 0, 1)


def mask_pixels(picture: Image, size: tuple[int, int]) -> np.ndarray:
    """FP32 [1, height, width]: 1 where to paint, 0 where to keep."""
    scaled = _resized(image_to_8_bits(picture, "mask_image"), size, "mask")
    painted = (np.asarray(scaled, np.float32) / 255.0 >= 0.5).astype(np.float32)[None]
    if not painted.any():
        _logger.warning("The mask is black everywhere, so nothing is painted; white is where to paint.")
    return painted


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
    """The array [H, W, 3], [H, W, 4] or [H, W], contiguous."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    grey, colour = array.ndim == 2, array.ndim == 3 and array.shape[2] in (3, 4)
    if not grey and (what == "mask_image" or not colour):
        wanted = "[H, W]" if what == "mask_image" else "[H, W, 3] or [H, W]"
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise SdqError(
            f"{what} is an array {list(array.shape)}; {wanted} is wanted.",
            "Channels go last: array.transpose(1, 2, 0)."
            if channels_first
            else "Several go in a list, one per prompt.",
        )
    _check_not_empty(array.shape, what)
    return np.ascontiguousarray(array)


def _check_not_empty(lengths: Sequence[int], what: str) -> None:
    if 0 in lengths:
        raise SdqError(f"{what} has no pixels: {'x'.join(str(length) for length in lengths)}.")


def _shows_through(picture: Image) -> bool:
    """Whether it has pixels that are not opaque."""
    if "transparency" not in picture.info and "A" not in picture.getbands():
        return False
    return bool(np.asarray(picture.convert("RGBA").getchannel("A")).min() < 255)


def _read(path: Path, what: str) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    if not path.is_file():
        raise SdqError(f"{what}: there is no file {path}.", "Give the path of a PNG, JPEG or WebP on this machine.")
    try:
        with images.open(path) as opened:
            # A camera's orientation is in its metadata; transposing also reads the file, so that damage shows here.
            return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        raise SdqError(
            f"{what}: {path} is not an image that can be read: {error}.", "PNG, JPEG and WebP are."
        ) from error
