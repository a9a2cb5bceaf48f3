"""The arguments of a call as Python people hand them in, each made into the one type that the runtime computes with.

What can only mean one thing is taken: numpy's numbers and strings, `7.0` or `"7"` for a whole number, text whose bytes
were read with the wrong encoding but are UTF-8. Everything else is refused by one sentence with the argument's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from sdq_engines.errors import SdqError

__all__ = ["as_choice", "as_number", "as_pair", "as_text", "as_texts", "as_whole", "as_wholes", "is_many"]


def as_whole(value: Any, name: str) -> int:
    """A whole number: an int, also numpy's, a float without a fraction, or the digits of one.

    Raises:
        SdqError: anything else, truth values too.
    """
    plain = _plain(value)
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
    """A finite number: an int or a float, also numpy's, or text that spells one.

    Raises:
        SdqError: anything else, truth values, infinity and NaN too.
    """
    plain = _plain(value)
    if isinstance(plain, int | float | str) and not isinstance(plain, bool):
        try:
            number = float(plain)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    return float(_not(value, name, "one finite number"))


def as_pair(value: Any, name: str) -> tuple[int, int]:
    """Two whole numbers.

    Raises:
        SdqError: anything else.
    """
    hint = "Give (height, width), or (top, left) of a crop."
    if not is_many(value) or len(found := list(value)) != 2:
        raise SdqError(f"{name}={_shown(value)} is not two numbers.", hint)
    return as_whole(found[0], name), as_whole(found[1], name)


def as_text(value: Any, name: str) -> str:
    """Text, also numpy's.

    Lone surrogates are what Python makes of bytes that its encoding cannot read, on a command line for one; where those
    bytes are UTF-8, or the surrogates are halves of one character, they can only mean that.

    Raises:
        SdqError: no text, or surrogates that are none of these.
    """
    plain = _plain(value)
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
    if isinstance(_plain(value), str) or not is_many(value):
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
    plain = _plain(value)
    if plain is None or plain is False:
        return None
    if plain is True:
        return choices[0]
    if plain in choices:
        return str(plain)
    raise SdqError(f"{name} is {_shown(value)}; {' or '.join(map(repr, choices))} is wanted.", "Or leave it out.")


def is_many(value: Any) -> bool:
    """Whether it is a row of values: a list, a tuple, a range, an array, an iterator; no text, set or mapping."""
    if isinstance(value, str | bytes | bytearray | Mapping | Set):
        return False
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) == 1


def _plain(value: Any) -> Any:
    """A scalar of numpy, torch or their kind as Python's own."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def _shown(value: Any) -> str:
    """A value in a sentence, however long it is."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"


def _not(value: Any, name: str, wanted: str) -> int:
    raise SdqError(f"{name} is {_shown(value)}; {wanted} is wanted.", f"For example {name.split('[')[0]}=7.")
