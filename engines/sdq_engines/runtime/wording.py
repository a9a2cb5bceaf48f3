"""What each text encoder reads: one text for all of them, or one each as Stable Diffusion XL and 3 take them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdq_engines.arguments import as_texts
from sdq_engines.errors import SdqError
from sdq_engines.package.layout import TEXT_ENCODER

__all__ = ["Wording", "negative_wordings", "prompt_wordings"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wording:
    """One prompt, or one negative prompt."""

    texts: tuple[str, ...]
    """One for each text encoder, in the package's order."""
    negative: bool = False
    """Whether it belongs to the unconditional half of guidance."""
    given: bool = True
    """Whether the caller gave it: without a negative prompt some models see zeros."""
    weighted: bool = False
    """Whether the weights in the texts count."""

    @staticmethod
    def same(text: str, encoders: int) -> Wording:
        """One text for every encoder."""
        return Wording((text,) * encoders)


def prompt_wordings(
    prompt: Any, others: Mapping[str, Any], encoders: Sequence[str], weighted: bool = False
) -> list[Wording]:
    """One for each prompt.

    Args:
        prompt: a text or a list of them.
        others: `prompt_2`, `prompt_3`: what the second and third encoder read in its place, one for all or one each.
        encoders: the package's text encoders.
        weighted: whether weights in the texts count.

    Raises:
        SdqError: no prompt, no text, lists of different lengths, or a text for an encoder that the package lacks.
    """
    first = as_texts(prompt, "prompt")
    texts = [first] if isinstance(first, str) else first
    rows = _rows("prompt", texts, others, encoders)
    return [Wording(row, weighted=weighted) for row in rows]


def negative_wordings(
    negative_prompt: Any,
    others: Mapping[str, Any],
    encoders: Sequence[str],
    count: int,
    weighted: bool = False,
    sees_zeros: bool = False,
) -> list[Wording]:
    """One for each prompt.

    Args:
        negative_prompt: a text for all, a list with one each, or None.
        others: `negative_prompt_2`, `negative_prompt_3`, as in `prompt_wordings`.
        encoders: the package's text encoders.
        count: how many prompts there are.
        weighted: whether weights in the texts count.
        sees_zeros: whether the model sees zeros where there is no negative prompt.

    Raises:
        SdqError: as `prompt_wordings`.
    """
    given = negative_prompt is not None
    first = as_texts(negative_prompt, "negative_prompt") if given else ""
    rows = _rows("negative_prompt", _each(first, count, "negative_prompt"), others, encoders)
    if not given and sees_zeros and any(value is not None for value in others.values()):
        names = ", ".join(name for name, value in others.items() if value is not None)
        _logger.warning("Without negative_prompt this model sees zeros, as in diffusers: %s changes nothing.", names)
    return [Wording(row, negative=True, given=given, weighted=weighted and given) for row in rows]


def _rows(name: str, texts: list[str], others: Mapping[str, Any], encoders: Sequence[str]) -> list[tuple[str, ...]]:
    """Each prompt's texts, one for each encoder; the empty text in another's place is the prompt, as in diffusers."""
    columns = {encoders[0]: texts} if encoders else {}
    for other, value in others.items():
        encoder = f"{TEXT_ENCODER}{other.removeprefix(name)}"
        if value is None:
            continue
        if encoder not in encoders:
            raise SdqError(f"{other} was given, and this package's model has no {encoder}.", f"Give {name} alone.")
        read = as_texts(value, other)
        columns[encoder] = texts if read == "" else _each(read, len(texts), other)
    return list(zip(*(columns.get(encoder, texts) for encoder in encoders), strict=True))


def _each(read: list[str] | str, count: int, name: str) -> list[str]:
    if isinstance(read, str):
        return [read] * count
    if len(read) != count:
        what = name.replace("_", " ")
        raise SdqError(f"{len(read)} {what}s were given for {count} prompts.", "Give one, or one each.")
    return read
