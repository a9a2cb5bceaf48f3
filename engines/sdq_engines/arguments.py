"""The arguments of a call as Python people hand them in, each made into the one type that the runtime computes with.

What can only mean one thing is taken: numpy's numbers and strings, `7.0` or `"7"` for a whole number, text whose bytes
were read with the wrong encoding but are UTF-8. Everything else is refused by one sentence with the argument's name.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError

__all__ = [
    "LARGEST",
    "as_choice",
    "as_folder",
    "as_function",
    "as_number",
    "as_pair",
    "as_plain",
    "as_text",
    "as_texts",
    "as_whole",
    "as_wholes",
    "is_many",
]

LARGEST = 2.0**127 * (2 - 2.0**-23)
"""The largest finite FP32 number, which everything is computed in."""


def as_whole(value: Any, name: str) -> int:
    """A whole number: an int, also numpy's, a float without a fraction, or the digits of one.

    Raises:
        SdqError: anything else, truth values too.
    """
    plain = as_plain(value)
    if not isinstance(plain, bool):
        try:
            return operator.index(plain)
        except TypeError:
            pass
        if isinstance(plain, float) and plain.is_integer():
            return int(plain)
        if isinstance(plain, str) and (digits := plain.strip()).removeprefix("-").isdecimal():
            return int(digits) if len(digits) < 30 else _not(value, name, "a whole number")
    return _not(value, name, "a whole number")


def as_number(value: Any, name: str) -> float:
    """A number that is finite in FP32: an int or a float, also numpy's, or text that spells one.

    Raises:
        SdqError: anything else, truth values, infinity and NaN too.
    """
    plain = as_plain(value)
    number = math.nan
    if isinstance(plain, int | float | str) and not isinstance(plain, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(plain)
    if math.isfinite(number):
        return _within(number, value, name)
    return float(_not(value, name, "one finite number"))


def as_pair(value: Any, name: str) -> tuple[int, int]:
    """Two whole numbers that are finite in FP32.

    Raises:
        SdqError: anything else.
    """
    hint = "Give (height, width), or (top, left) of a crop."
    if not is_many(value) or len(found := list(value)) != 2:
        raise SdqError(f"{name}={_shown(value)} is not two numbers.", hint)
    first, second = as_whole(found[0], name), as_whole(found[1], name)
    for each in (first, second):
        _within(each, value, name)
    return first, second


def as_text(value: Any, name: str) -> str:
    """Text, also numpy's.

    Lone surrogates are what Python makes of bytes that its encoding cannot read, on a command line for one; where those
    bytes are UTF-8, or the surrogates are halves of one character, they can only mean that.

    Raises:
        SdqError: no text, or surrogates that are none of these.
    """
    plain = as_plain(value)
    if not isinstance(plain, str):
        empty = " The empty prompt is ''." if value is None else ""
        raise SdqError(f"{name} is {_shown(value)}; text is wanted.", f"Give a string, or a list of them.{empty}")
    text = str(plain)
    surrogate = next((index for index, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if surrogate is None:
        return text
    for encoding, how in (("utf-8", "surrogateescape"), ("utf-16", "surrogatepass")):
        try:
            return text.encode(encoding, how).decode(encoding)
        except UnicodeError:
            continue
    raise SdqError(
        f"{name} is no text: its character {surrogate}, {text[surrogate]!r}, is half a character or a byte of another "
        "encoding.",
        "Decode the text with the encoding that it was written in, or set a UTF-8 locale.",
    )


def as_texts(value: Any, name: str) -> list[str] | str:
    """One text, or a list of texts from anything that has an order.

    Raises:
        SdqError: anything else.
    """
    if isinstance(as_plain(value), str) or not is_many(value):
        return as_text(value, name)
    return [as_text(each, f"{name}[{index}]") for index, each in enumerate(value)]


def as_wholes(value: Any, name: str) -> list[int] | int:
    """One whole number, or a list of them from anything that has an order, such as an array.

    Raises:
        SdqError: anything else.
    """
    if not is_many(value):
        return as_whole(value, name)
    return [as_whole(each, f"{name}[{index}]") for index, each in enumerate(value)]


def as_choice(value: Any, name: str, *choices: str) -> str | None:
    """One of the choices; True is the first of them, None and False are none.

    Raises:
        SdqError: anything else.
    """
    plain = as_plain(value)
    if plain is None or plain is False:
        return None
    if plain is True:
        return choices[0]
    if plain in choices:
        return str(plain)
    raise SdqError(f"{name} is {_shown(value)}; {' or '.join(map(repr, choices))} is wanted.", "Or leave it out.")


def as_folder(value: Any, name: str) -> Path:
    """The path of a folder, from text or a path.

    Raises:
        SdqError: anything else.
    """
    plain = as_plain(value)
    if not isinstance(plain, str | os.PathLike) or isinstance(path := os.fspath(plain), bytes):
        raise SdqError(f"{name} is {_shown(value)}; the path of a folder is wanted.", 'For example "package".')
    return Path(path)


def as_function(value: Any, name: str) -> Any:
    """Something that can be called, or None.

    Raises:
        SdqError: anything else.
    """
    if value is None or callable(value):
        return value
    raise SdqError(f"{name} is {_shown(value)}; a function is wanted.", "Or leave it out.")


def as_plain(value: Any) -> Any:
    """A scalar of numpy, torch or their kind as Python's own; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def is_many(value: Any) -> bool:
    """Whether it is a row of values: a list, a tuple, a range, an array, an iterator; no text, set or mapping."""
    if isinstance(value, str | bytes | bytearray | Mapping | Set):
        return False
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) == 1


def _shown(value: Any) -> str:
    """A value in a sentence, however long it is."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"


def _within(number: float, value: Any, name: str) -> float:
    if abs(number) > LARGEST:
        raise SdqError(
            f"{name} is {_shown(value)}, which is too large: numbers are computed in FP32, whose largest is "
            f"{LARGEST:.3g}.",
            "Give a smaller one.",
        )
    return number


def _not(value: Any, name: str, wanted: str) -> int:
    raise SdqError(f"{name} is {_shown(value)}; {wanted} is wanted.", f"For example {name.split('[')[0]}=7.")
