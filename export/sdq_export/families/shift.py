"""The shift of a scheduler's noise levels by the image's size, settled for a checkpoint's own (`dynamic_shift`)."""

from __future__ import annotations

from typing import Any

from sdq_engines.errors import SdqError
from sdq_export.dynamic_shift import is_dynamic
from sdq_export.families.base import Family

__all__ = ["settle_shift"]

_PIPELINE = "StableDiffusion3Pipeline"
"""The one pipeline of the supported families that hands its scheduler a shift."""


def settle_shift(family: Family, scheduler: Any) -> Any:
    """The scheduler with the shift of the checkpoint's own size in its configuration; any other as it is.

    Raises:
        SdqError: the checkpoint's pipeline hands its scheduler no shift, so that diffusers does not run it either.
    """
    config = scheduler.config
    if not is_dynamic(config):
        return scheduler
    if family.pipeline != _PIPELINE:
        raise SdqError(
            f"The scheduler of {family.checkpoint.model} has use_dynamic_shifting, and diffusers' {family.pipeline} "
            "hands its scheduler no shift.",
            "Set use_dynamic_shifting to false in scheduler/scheduler_config.json.",
        )
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    _, height, width = family.latent_shape
    patch = family.checkpoint.skeleton.config.patch_size
    shift = calculate_shift(
        (height // patch) * (width // patch),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.16),
    )
    explicit = {key: value for key, value in config.items() if key != "_use_default_values"}
    return type(scheduler).from_config({**explicit, "base_shift": shift, "max_shift": shift})
