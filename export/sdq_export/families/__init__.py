"""What differs between model families. One file a family, listed here; docs/families.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sdq_engines.errors import SdqError
from sdq_export.families.base import Family
from sdq_export.families.network import Network
from sdq_export.families.sd import StableDiffusion
from sdq_export.families.sd3 import StableDiffusion3, StableDiffusion3WithT5
from sdq_export.families.sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "Family", "Network", "family_of_checkpoint", "network_of", "parts_named"]

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3WithT5,
    StableDiffusion3,
)


def network_of(denoiser: nn.Module) -> Network:
    """What kind of denoiser this is.

    Raises:
        SdqError: it is of none of our families.
    """
    for family in FAMILIES:
        if family.network.owns(denoiser):
            return family.network
    raise SdqError(f"The denoiser is a {type(denoiser).__name__}, which no supported model family has.")


def family_of_checkpoint(folder: Path, model: str, index: Mapping[str, Any]) -> type[Family]:
    """The family of the checkpoint in a folder.

    Args:
        folder: it.
        model: what the user named.
        index: its model_index.json.

    Raises:
        SdqError: it names no pipeline, or one of none of our families.
    """
    if index.get("_class_name") is None:
        raise SdqError(
            f"The model_index.json of {model} names no pipeline.",
            'Add its class, for example "_class_name": "StableDiffusionPipeline".',
        )
    family = next((family for family in FAMILIES if family.fits(folder, index)), None)
    if family is None:
        known = ", ".join(dict.fromkeys(name for each in FAMILIES for name in each.pipelines()))
        raise SdqError(
            f"{model} is a {index.get('_class_name')}; supported are checkpoints of {known}.", "See docs/families.md."
        )
    return family


def parts_named(index: Mapping[str, Any]) -> list[str]:
    """The parts that an index names, of any family of its pipeline: which family it is may depend on what is there."""
    families = [family for family in FAMILIES if index["_class_name"] in family.pipelines()]
    parts = dict.fromkeys(part for family in families for part in family.parts)
    return [part for part in parts if index.get(part) not in (None, [None, None])]
