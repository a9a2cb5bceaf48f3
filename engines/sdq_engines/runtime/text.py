"""Prompt -> token ids, padded and cut as diffusers' Stable Diffusion pipeline does with CLIP's tokenizer.

A package of several chunks (`export --prompt-chunks`) takes longer prompts: each chunk is encoded by itself, with its
own begin and end mark, and their embeddings stand one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import TextInfo
from sdq_engines.runtime.weighting import Fragment, parse_weights, split_breaks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PromptTokenizer", "Tokens", "load_tokenizer"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """One prompt for one text encoder."""

    ids: np.ndarray
    """int64 [chunks, L]."""
    weights: np.ndarray
    """FP32 [chunks, L], 1 but for what is weighted."""

    @property
    def is_weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return bool((self.weights != 1).any())


@dataclass(frozen=True)
class _Piece:
    """Tokens that stay together: one, or all vectors of a textual inversion."""

    ids: tuple[int, ...]
    weight: float
    text: str
    """From its first character to the end of its fragment."""
    fragment: int
    """The number of that fragment."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json.

    Raises:
        SdqError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise SdqError(f"{path} is not a tokenizer that can be read: {error}.", "Export the package again.") from error


class PromptTokenizer:
    """Prompts to rows of token ids for one text encoder.

    Args:
        tokenizer: the package's; its own padding and truncation are switched off, for they follow `info` alone.
        info: the length, the number of chunks and the special tokens.
        breaks: whether the word BREAK divides prompts: it does where any text encoder of the package takes chunks.
    """

    def __init__(self, tokenizer: Tokenizer, info: TextInfo, breaks: bool | None = None) -> None:
        self.info = info
        self.breaks = info.chunks > 1 if breaks is None else breaks
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._first = {tokenizer.token_to_id(name): len(written.split()) for name, written in info.written_out.items()}

    def encode(self, prompt: str, weighted: bool = False, warn: bool = True) -> Tokens:
        """Each chunk: begin mark, tokens, end mark, padding; what follows the prompt's own chunks are empty ones.

        A prompt with more tokens than fit keeps the first ones; what was cut is logged as a warning.

        Args:
            prompt: text; the name of a textual inversion of several vectors stands for all of them.
            weighted: read the weights that it has (`sdq_engines.runtime.weighting`).
            warn: say what was cut.

        Raises:
            SdqError: weights that cannot be read, or a BREAK where the package takes one chunk.
        """
        groups = self._groups(prompt, weighted)
        chunks = self._divide(groups)
        kept, cut = chunks[: self.info.chunks], [piece for chunk in chunks[self.info.chunks :] for piece in chunk]
        if cut and warn:
            self._warn(cut, [fragment for group in groups for fragment in group])
        kept += [[] for _ in range(self.info.chunks - len(kept))]
        rows = [self._row([(token, piece.weight) for piece in chunk for token in piece.ids]) for chunk in kept]
        return Tokens(
            np.array([[token for token, _ in row] for row in rows], np.int64),
            np.array([[weight for _, weight in row] for row in rows], np.float32),
        )

    def fits(self, prompt: str) -> bool:
        """Whether nothing of a prompt is cut off."""
        return len(self._divide(self._groups(prompt, weighted=False))) <= self.info.chunks

    def _groups(self, prompt: str, weighted: bool) -> list[list[Fragment]]:
        """The fragments between one BREAK and the next."""
        if weighted:
            groups = parse_weights(prompt)
            if len(groups) > 1 and not self.breaks:
                raise SdqError(
                    "The prompt has a BREAK, and this package takes one chunk of a prompt.",
                    "Leave it out, or export the package with --prompt-chunks 2.",
                )
        else:
            groups = [[Fragment(part)] for part in (split_breaks(prompt) if self.breaks else [prompt])]
        return groups if self.info.chunks > 1 else [[fragment for group in groups for fragment in group]]

    def _divide(self, groups: list[list[Fragment]]) -> list[list[_Piece]]:
        """As many chunks as the prompt needs."""
        room, chunks, count = self._room, list[list[_Piece]](), 0
        current: list[_Piece] = []
        for number, group in enumerate(groups):
            if number:
                chunks.append(current)
                current = []
            for fragment in group:
                for piece in self._pieces(fragment, count):
                    if sum(len(each.ids) for each in current) + len(piece.ids) > room:
                        chunks.append(current)
                        current = []
                    current.append(piece)
                count += 1
        return [*chunks, current] if current or not chunks else chunks

    def _pieces(self, fragment: Fragment, number: int) -> Iterator[_Piece]:
        text = self._expanded(fragment.text)
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids, position = encoded.ids, 0
        while position < len(ids):
            # one chunk is cut as diffusers cuts it, in the middle of an embedding if need be
            together = self._first.get(ids[position], 1) if self.info.chunks > 1 else 1
            taken = tuple(ids[position : position + (together if together <= self._room else 1)])
            yield _Piece(taken, fragment.weight, text[encoded.offsets[position][0] :], number)
            position += len(taken)

    def _expanded(self, text: str) -> str:
        """A name that stands for several vectors, followed by theirs: diffusers' `maybe_convert_prompt`."""
        if not self.info.written_out:
            return text
        found = set(self._tokenizer.encode(text, add_special_tokens=False).tokens)
        for token, written in self.info.written_out.items():
            if token in found:
                text = text.replace(token, written)
        return text

    @property
    def _room(self) -> int:
        """Tokens of a chunk beside its marks."""
        return self.info.max_length - 1 - (self.info.bos_token_id >= 0)

    def _row(self, tokens: list[tuple[int, float]]) -> list[tuple[int, float]]:
        info = self.info
        begin = [(info.bos_token_id, 1.0)] if info.bos_token_id >= 0 else []
        row = [*begin, *tokens, (info.eos_token_id, 1.0)]
        return row + [(info.pad_token_id, 1.0)] * (info.max_length - len(row))

    def _warn(self, cut: list[_Piece], fragments: list[Fragment]) -> None:
        rest = [cut[0].text, *(fragment.text for fragment in fragments[cut[0].fragment + 1 :])]
        takes = f"{self.info.max_length} tokens"
        if self.info.chunks > 1:
            takes = f"{self.info.chunks} chunks of {takes}"
        _logger.warning(
            "The prompt is longer than the %s that this model takes; the end was cut off: %r",
            takes,
            "".join(rest).strip(),
        )
