"""From prompts to what the prologue takes: every text encoder of the package, and the size that SDXL is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdq_engines.package.schema import NEGATIVE_OUTPUT, SIZE_INPUT, TEXT_OUTPUT
from sdq_engines.runtime.text import PromptTokenizer, Tokens, load_tokenizer
from sdq_engines.runtime.wording import Wording

if TYPE_CHECKING:
    from sdq_engines.backends.base import Arrays, Session
    from sdq_engines.package.store import Package

__all__ = ["ImageSize", "PromptEncoder"]


@dataclass(frozen=True)
class ImageSize:
    """SDXL's size conditioning, each (height, width) or (top, left) in pixels; None is the package's own image size."""

    original: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def row(self, own: tuple[int, int]) -> np.ndarray:
        """FP32 [1, 6]: original size, crop's corner, target size."""
        return np.array([[*(self.original or own), *self.crop_top_left, *(self.target or own)]], np.float32)


class PromptEncoder:
    """The package's tokenizers and text encoders.

    Args:
        package: says which there are.
        session: the loaded engine.
    """

    def __init__(self, package: Package, session: Session) -> None:
        self.io, self.session = package.manifest.io, session
        breaks = any(text.chunks > 1 for text in package.manifest.text)
        self._tokenizers = {
            text.component: PromptTokenizer(load_tokenizer(package.path(text.tokenizer)), text, breaks)
            for text in package.manifest.text
        }

    @property
    def components(self) -> list[str]:
        """The text encoders, in the manifest's order."""
        return list(self._tokenizers)

    @property
    def takes_size(self) -> bool:
        """Whether the model is told the image's size."""
        return SIZE_INPUT in self.io.prologue_inputs

    def check(self, wordings: Iterable[Wording]) -> None:
        """Read every text of a call, before anything is computed.

        Raises:
            SdqError: weights that cannot be read, or a BREAK where the package takes one chunk.
        """
        for wording in dict.fromkeys(wordings):
            for tokenizer, text in zip(self._tokenizers.values(), wording.texts, strict=True):
                tokenizer.encode(text, wording.weighted, warn=False)

    def embed(self, component: str, texts: Sequence[str], weighted: bool = False) -> Arrays:
        """One text encoder's outputs, [n, ...] each; embeddings of several chunks stand side by side, [n, chunks*L, D].

        Args:
            component: the text encoder.
            texts: n of them.
            weighted: read the weights that they have.
        """
        each = [self._embed(component, self._tokenizers[component].encode(text, weighted)) for text in texts]
        return {name: np.concatenate([outputs[name] for outputs in each]) for name in each[0]}

    def encode(self, prompts: Sequence[Wording | str], size: ImageSize | None = None) -> Arrays:
        """The prologue's inputs, [n, ...] each.

        Args:
            prompts: a plain text is read by every text encoder. The unconditional half of guidance where the caller
                gives no negative prompt sees zeros, for a model that was trained so, else the empty prompt.
            size: for a model that takes one; by default the package's image size throughout.
        """
        worded = [Wording.same(each, len(self.components)) if isinstance(each, str) else each for each in prompts]
        rows = [self._encode(wording) for wording in worded]
        inputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        if self.takes_size:
            inputs[SIZE_INPUT] = (size or ImageSize()).row(self.io.image_size).repeat(len(prompts), axis=0)
        return inputs

    def _encode(self, wording: Wording) -> Arrays:
        found: dict[str, list[np.ndarray]] = {}
        for component, text in zip(self.components, wording.texts, strict=True):
            outputs = self.embed(component, [text], wording.weighted)
            plain = outputs.pop(NEGATIVE_OUTPUT, None)
            if plain is not None and wording.negative:
                outputs[TEXT_OUTPUT] = plain
            for name, array in outputs.items():
                found.setdefault(name, []).append(array)
        # outputs of one name belong side by side (docs/package-format.md)
        inputs = {name: np.concatenate(parts, axis=-1) for name, parts in found.items()}
        if self.io.force_zeros_for_empty_prompt and not wording.given:
            return {name: np.zeros_like(array) for name, array in inputs.items()}
        return inputs

    def _embed(self, component: str, tokens: Tokens) -> Arrays:
        """Outputs of one prompt, [1, ...] each: the encoder runs once for every different chunk."""
        encoder = self.session.component(component)
        made: dict[bytes, Arrays] = {}
        for row in tokens.ids:
            if row.tobytes() not in made:
                made[row.tobytes()] = encoder.run({"input_ids": row[None]})
        chunks = [made[row.tobytes()] for row in tokens.ids]
        joined = {}
        for name, first in chunks[0].items():
            if first.ndim != 3:  # one vector a prompt comes from its first chunk
                joined[name] = first
                continue
            parts = [chunk[name] for chunk in chunks]
            if tokens.is_weighted:
                parts = [_weighted(part, weights) for part, weights in zip(parts, tokens.weights, strict=True)]
            joined[name] = np.concatenate(parts, axis=1)
        return joined


def _weighted(embeddings: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each token's embedding [1, L, D] times its weight, then all by the one factor that keeps the chunk's mean.

    As AUTOMATIC1111's web UI does ("Emphasis mode: Original") for a single prompt.
    """
    scaled = embeddings * weights[None, :, None]
    mean, kept = float(scaled.mean(dtype=np.float64)), float(embeddings.mean(dtype=np.float64))
    return scaled if mean == 0 else scaled * np.float32(kept / mean)
