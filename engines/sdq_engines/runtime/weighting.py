"""Weights and chunks as people write them into prompts for AUTOMATIC1111's web UI (its wiki, "Attention/emphasis").

`(word)` weighs 1.1 times more, `[word]` 1.1 times less, `(word:1.3)` 1.3 times; brackets nest, and what is left open
reaches to the end. `\\(`, `\\)`, `\\[`, `\\]` and `\\\\` are the signs themselves. The word BREAK begins a new chunk.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sdq_engines.arguments import LARGEST
from sdq_engines.errors import SdqError

__all__ = ["Fragment", "parse_weights", "split_breaks"]

_STEP = 1.1
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_CLOSING_WEIGHT = re.compile(r":\s*([+-]?[.\d]+)\s*\)")
_PLAIN = re.compile(r"[^\\()\[\]:]+")

#: What the web UI does beyond weights; it would change the prompt from step to step, or the model.
_OTHERS = (
    (re.compile(r"<(?:lora|lyco|hypernet):[^>]*>"), "it loads an adapter", "Fuse it: sdq-deploy train --lora FILE."),
    (re.compile(r"(?<!\\)\[[^\[\]]*[:|][^\[\]]*\]"), "it changes the prompt from step to step", "Leave it out."),
    (re.compile(r"\bAND\b"), "it combines several prompts", "Write it in small letters where it is a word."),
)


@dataclass(frozen=True)
class Fragment:
    """Text of one weight."""

    text: str
    weight: float = 1.0


def split_breaks(prompt: str) -> list[str]:
    """The prompt's chunks, as BREAK divides it."""
    return _BREAK.split(prompt)


def parse_weights(prompt: str) -> list[list[Fragment]]:
    """A prompt's chunks, as BREAK divides it, and each chunk's fragments of one weight.

    Raises:
        SdqError: a weight that is no number or too large for FP32, or what the web UI has beyond weights and chunks.
    """
    for pattern, does, hint in _OTHERS:
        if found := pattern.search(prompt):
            raise SdqError(f"The prompt has {found[0]!r}: {does}, which a package cannot do.", hint)
    parser = _Parser()
    position = 0
    while position < len(prompt):
        position = parser.read(prompt, position)
    chunks = parser.chunks()
    for fragment in (fragment for chunk in chunks for fragment in chunk):
        if not abs(fragment.weight) <= LARGEST:
            raise SdqError(
                f"The prompt gives {fragment.text!r} the weight {fragment.weight:.3g}, which is too large for FP32.",
                "For example (word:1.2).",
            )
    return chunks


class _Parser:
    """Reads a prompt from left to right; a bracket multiplies what was read since it was opened."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str | None, float]] = []
        """Text and weight; None for BREAK."""
        self._open: dict[str, list[int]] = {"(": [], "[": []}
        """Where the brackets that are open began."""

    def read(self, prompt: str, position: int) -> int:
        """Take the next sign or run of plain text; returns where to go on."""
        sign = prompt[position]
        if sign == "\\":
            self._add(prompt[position + 1 : position + 2])
            return position + 2
        if sign in self._open:
            self._open[sign].append(len(self._pieces))
            return position + 1
        if self._open["("] and (weight := _CLOSING_WEIGHT.match(prompt, position)):
            self._multiply(self._open["("].pop(), _number(weight))
            return weight.end()
        bracket, factor = {")": ("(", _STEP), "]": ("[", 1 / _STEP)}.get(sign, ("", 1.0))
        if bracket and self._open[bracket]:
            self._multiply(self._open[bracket].pop(), factor)
            return position + 1
        plain = _PLAIN.match(prompt, position)
        self._add(plain[0] if plain else sign)
        return plain.end() if plain else position + 1

    def chunks(self) -> list[list[Fragment]]:
        """What was read; brackets that are still open are closed."""
        for bracket, factor in (("(", _STEP), ("[", 1 / _STEP)):
            for start in self._open[bracket]:
                self._multiply(start, factor)
            self._open[bracket] = []
        found: list[list[Fragment]] = [[]]
        for text, weight in self._pieces:
            if text is None:
                found.append([])
            elif found[-1] and found[-1][-1].weight == weight:
                found[-1][-1] = Fragment(found[-1][-1].text + text, weight)
            elif text:
                found[-1].append(Fragment(text, weight))
        return found

    def _add(self, text: str) -> None:
        for index, part in enumerate(_BREAK.split(text)):
            if index:
                self._pieces.append((None, 1.0))
            self._pieces.append((part, 1.0))

    def _multiply(self, start: int, factor: float) -> None:
        self._pieces[start:] = [(text, weight * factor) for text, weight in self._pieces[start:]]


def _number(found: re.Match[str]) -> float:
    try:
        weight = float(found[1])
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise SdqError(f"The prompt has the weight {found[1]!r}, which is no number.", "For example (word:1.2).")
    return weight
