"""Pictures of any number type as 8 bits, where the values can mean one thing only.

1. 8-bit pictures stay as they are; of other integer types only values from 0 to 255 are taken.
2. 16-bit ones are divided by 257: 65535 is white. A 16-bit array without a value above 255 may be either; refused.
3. Floating-point ones are in [0, 1]: 1 is white. Anything outside of that, or not finite, is refused.
4. A mask of nothing but 0 and 1 has 1 as white, whatever its type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["array_to_8_bits", "image_to_8_bits"]

MASK = "mask_image"
_HINT = "8 bits have 0 to 255, 16 bits 0 to 65535, floats 0.0 to 1.0."


def image_to_8_bits(picture: Image, what: str) -> Image:
    """A PIL image of more than 8 bits a channel, or a mask of 0 and 1, in 8 bits; any other as it is, a mask in grey.

    Args:
        picture: any mode.
        what: "image" or "mask_image", for messages.

    Raises:
        SdqError: its values could mean more than one thing.
    """
    from PIL import Image as images

    deep = picture.mode.startswith("I;16") or picture.mode in ("I", "F")
    if what == MASK and not deep:
        picture = picture.convert("L")
    zero_or_one = what == MASK and picture.mode == "L" and picture.getextrema()[1] == 1
    if not deep and not zero_or_one:
        return picture
    return images.fromarray(array_to_8_bits(_values(picture), what))


def _values(picture: Image) -> np.ndarray[Any, Any]:
    values = np.asarray(picture)
    return values.astype(np.uint16) if picture.mode.startswith("I;16") else values  # "I;16B" comes big-endian


def array_to_8_bits(array: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 of the same shape; case numbers as in the module.

    Args:
        array: not empty, of any numeric type.
        what: "image" or "mask_image".

    Raises:
        SdqError: its values could mean more than one thing, or nothing.
    """
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise SdqError(f"{what} is an array of {array.dtype}; numbers are wanted.", _HINT)
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":  # 3
        if not (low >= 0 and high <= 1):  # NaN is in neither
            raise SdqError(f"{what} has values from {low:.4g} to {high:.4g} of {array.dtype}; 0 to 1 is wanted.", _HINT)
        return (255 * array.astype(np.float64)).round().astype(np.uint8)
    if what == MASK and low >= 0 and high <= 1:  # 4
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:  # 1
        return array
    if array.dtype == np.uint16 and high > 255:  # 2
        return (array / 257).round().astype(np.uint8)
    if low < 0 or high > 255 or high == 1 or (array.dtype == np.uint16 and high > 0):
        raise SdqError(
            f"{what} has values from {low} to {high} of {array.dtype}, which may mean several things.", _HINT
        )
    return array.astype(np.uint8)  # 1
