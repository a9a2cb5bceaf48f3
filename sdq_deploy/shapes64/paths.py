"""Where the shipped weights are, inside the installed package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["classifier_path", "model_path"]

_MODEL = Path(__file__).parent / "model"


def model_path() -> Path:
    """The diffusers folder of shapes-64: what `StableDiffusionPipeline.from_pretrained` loads."""
    return _MODEL


def classifier_path() -> Path:
    """The safetensors file of the caption classifier."""
    return _MODEL / "classifier" / "classifier.safetensors"
