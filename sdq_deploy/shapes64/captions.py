"""The caption grammar, over a closed vocabulary in which every word is one token.

caption    := subjects " on a " background " background"
subjects   := one ["," place] | one [relation] one | one "," one "and" one [order]
one        := "a" [size] colour kind
background := ["plain"] colour | colour "to" colour "gradient" | texture colour
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sdq_deploy.shapes64.objects import Background, SceneObject

__all__ = ["KINDS", "VOCABULARY", "caption_of", "contents_of"]

KINDS = ("circle", "square", "triangle", "cross", "ring")

#: Every word (and the comma) that a caption can hold.
VOCABULARY: tuple[str, ...] = (
    *KINDS,
    *("red", "yellow", "green", "cyan", "blue", "purple", "pink"),
    *("white", "gray", "black", "navy"),
    *("plain", "gradient", "striped", "checkered", "background"),
    *("small", "large", "left", "right", "top", "bottom", "middle", "above", "below"),
    *("a", "and", "at", "from", "in", "of", "on", "the", "to", ","),
)


def caption_of(objects: Sequence[SceneObject], background: Background, relation: str | None) -> str:
    """The sentence that describes a scene of one to three objects."""
    names = [_name(item) for item in objects]
    return f"{_subjects(names, relation)} on a {_backdrop(background)} background"


def contents_of(caption: str) -> frozenset[tuple[str, str]]:
    """The (kind, colour) of every object that a caption names: each kind with the word before it."""
    words = caption.replace(",", " ").split()
    return frozenset((word, before) for before, word in pairwise(words) if word in KINDS)


def _name(item: SceneObject) -> str:
    return " ".join(word for word in ("a", item.size, item.colour, item.kind) if word)


def _subjects(names: list[str], relation: str | None) -> str:
    if len(names) == 1:
        return names[0] if relation is None else f"{names[0]} {relation}"
    if len(names) == 2:
        return f"{names[0]} {relation or 'and'} {names[1]}"
    listed = f"{names[0]}, {names[1]} and {names[2]}"
    return listed if relation is None else f"{listed} {relation}"


def _backdrop(background: Background) -> str:
    if background.pattern == "gradient":
        return f"{background.colours[0]} to {background.colours[1]} gradient"
    return f"{background.pattern} {background.colours[0]}"
