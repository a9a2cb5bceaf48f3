"""Schedulers whose noise levels shift with the image's size (`use_dynamic_shifting`), settled for one size.

diffusers' pipeline of Stable Diffusion 3 computes the shift, `mu`, from the number of patches of the latents, and hands
it to the scheduler at each call. A package's timesteps are computed once, so the shift of its own size is written into
the scheduler's configuration: with `base_shift` and `max_shift` both at `mu`, the pipeline's formula gives `mu` for any
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdq_export.source import Source

__all__ = ["is_dynamic", "settle_shift", "settled_shift"]

_PIPELINE = "StableDiffusion3Pipeline"
"""The one pipeline of the supported families that hands its scheduler a shift."""


def is_dynamic(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this configuration asks for a shift by the image's size."""
    return bool(config.get("use_dynamic_shifting"))


def settle_shift(source: Source, scheduler: Any) -> Any:
    """The scheduler with the shift of the checkpoint's own size in its configuration; any other as it is.

    Raises:
        SdqError: the checkpoint's pipeline hands its scheduler no shift, so that diffusers does not run it either.
    """
    config = scheduler.config
    if not is_dynamic(config):
        return scheduler
    if source.family.pipeline != _PIPELINE:
        raise SdqError(
            f"The scheduler of {source.model} has use_dynamic_shifting, and diffusers' {source.family.pipeline} hands "
            "its scheduler no shift.",
            "Set use_dynamic_shifting to false in scheduler/scheduler_config.json.",
        )
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    _, height, width = source.family.latent_shape(source)
    patch = source.skeleton.config.patch_size
    shift = calculate_shift(
        (height // patch) * (width // patch),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.16),
    )
    explicit = {key: value for key, value in config.items() if key != "_use_default_values"}
    return type(scheduler).from_config({**explicit, "base_shift": shift, "max_shift": shift})


def settled_shift(config: Mapping[str, Any]) -> float | None:
    """The shift of a configuration that `settle_shift` made; None for a scheduler that takes none.

    Raises:
        SdqError: the shift is not settled.
    """
    if not is_dynamic(config):
        return None
    if config.get("base_shift") != config.get("max_shift"):
        raise SdqError(
            "The scheduler has use_dynamic_shifting: its timesteps depend on the image's size, and no size is named.",
            "Give base_shift and max_shift one value, or set use_dynamic_shifting to false.",
        )
    return float(config["base_shift"])
