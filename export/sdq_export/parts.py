"""What is asked of a checkpoint by what lies below `Source`: its parts, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sdq_export.text_settings import TextSettings

__all__ = ["Parts"]


class Parts(Protocol):
    """A checkpoint's parts; `sdq_export.source.Source` is one.

    Attributes:
        folder: where it is.
        model: what the user named.
        index: model_index.json.
        text: how prompts are read.
    """

    folder: Path
    model: str
    index: dict[str, Any]
    text: TextSettings

    @property
    def skeleton(self) -> Any:
        """The denoiser's architecture and configuration without its weights."""

    @property
    def vae(self) -> Any:
        """diffusers' AutoencoderKL."""

    def part(self, name: str) -> Any:
        """A model or tokenizer, loaded once."""
