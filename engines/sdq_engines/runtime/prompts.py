"""From prompts to what the prologue takes: every text encoder of the package, and the size that SDXL is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdq_engines.package.schema import SIZE_INPUT
from sdq_engines.runtime.text import PromptTokenizer

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
        self._tokenizers = [
            (text.component, PromptTokenizer(package.path(text.tokenizer), text)) for text in package.manifest.text
        ]

    @property
    def components(self) -> list[str]:
        """The text encoders, in the manifest's order."""
        return [component for component, _ in self._tokenizers]

    @property
    def takes_size(self) -> bool:
        """Whether the model is told the image's size."""
        return SIZE_INPUT in self.io.prologue_inputs

    def embed(self, component: str, texts: Sequence[str]) -> Arrays:
        """One text encoder's outputs, [n, ...] each."""
        tokenizer = dict(self._tokenizers)[component]
        return self.session.component(component).run({"input_ids": tokenizer.encode(texts)})

    def encode(self, prompts: Sequence[str | None], size: ImageSize | None = None) -> Arrays:
        """The prologue's inputs, [n, ...] each.

        Args:
            prompts: None is the unconditional half of guidance where the caller gives no negative prompt: zeros for a
                model that was trained so, else the empty prompt.
            size: for a model that takes one; by default the package's image size throughout.
        """
        found: dict[str, list[np.ndarray]] = {}
        for component in self.components:
            for name, array in self.embed(component, [prompt or "" for prompt in prompts]).items():
                found.setdefault(name, []).append(array)
        # outputs of one name belong side by side (docs/package-format.md)
        inputs = {name: np.concatenate(parts, axis=-1) for name, parts in found.items()}
        if self.io.force_zeros_for_empty_prompt:
            absent = np.array([prompt is None for prompt in prompts])
            inputs = {name: np.where(_like(absent, array), 0, array) for name, array in inputs.items()}
        if self.takes_size:
            inputs[SIZE_INPUT] = (size or ImageSize()).row(self.io.image_size).repeat(len(prompts), axis=0)
        return inputs


def _like(rows: np.ndarray, array: np.ndarray) -> np.ndarray:
    """[n] in a shape that broadcasts over [n, ...]."""
    return rows.reshape(-1, *[1] * (array.ndim - 1))
