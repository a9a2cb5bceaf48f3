"""Schedulers whose noise levels shift with the image's size (`use_dynamic_shifting`), settled for one size.

diffusers' pipeline of Stable Diffusion 3 computes the shift, `mu`, from the number of patches of the latents, and hands
it to the scheduler at each call. A package's timesteps are computed once, so the shift of its own size is written into
the scheduler's configuration: with `base_shift` and `max_shift` both at `mu`, the pipeline's formula gives `mu` for any
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdq_engines.errors import SdqError

__all__ = ["is_dynamic", "settled_shift"]


def is_dynamic(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this configuration asks for a shift by the image's size."""
    return bool(config.get("use_dynamic_shifting"))


def settled_shift(config: Mapping[str, Any]) -> float | None:
    """The shift of a configuration that `families.shift.settle_shift` made; None for a scheduler that takes none.

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
