"""What differs between model families. One file a family, listed here; docs/families.md says how to add one."""

from __future__ import annotations

from torch import nn

from sdq_engines.errors import SdqError
from sdq_export.families.base import Family
from sdq_export.families.sd import StableDiffusion

__all__ = ["FAMILIES", "Family", "family_of", "family_of_pipeline"]

FAMILIES: tuple[Family, ...] = (StableDiffusion(),)


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        SdqError: it is none of ours.
    """
    for family in FAMILIES:
        if family.owns(denoiser):
            return family
    raise SdqError(f"The denoiser is a {type(denoiser).__name__}, which no supported model family has.")


def family_of_pipeline(pipeline: str) -> Family | None:
    """The family whose checkpoints name this pipeline in model_index.json."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)
