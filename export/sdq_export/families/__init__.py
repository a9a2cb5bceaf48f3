"""What differs between model families. One file a family, listed here; docs/families.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sdq_engines.errors import SdqError
from sdq_export.families.base import Family
from sdq_export.families.sd import StableDiffusion
from sdq_export.families.sd3 import StableDiffusion3, StableDiffusion3WithT5
from sdq_export.families.sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "Family", "family_of", "family_of_checkpoint"]

FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    StableDiffusionXL(),
    StableDiffusion3WithT5(),
    StableDiffusion3(),
)


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        SdqError: it is none of ours.
    """
    for family in FAMILIES:
        if family.owns(denoiser):
            return family
    raise SdqError(f"The denoiser is a {type(denoiser).__name__}, which no supported model family has.")


def family_of_checkpoint(folder: Path, index: Mapping[str, Any]) -> Family | None:
    """The family of the checkpoint in a folder, by its model_index.json; None if it is none of ours."""
    return next((family for family in FAMILIES if family.fits(folder, index)), None)
