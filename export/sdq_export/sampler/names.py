"""The scheduler names of the command line, and the diffusers classes behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from sdq_engines.errors import SdqError

__all__ = ["SCHEDULER_NAMES", "make_scheduler", "saved_scheduler"]

_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: diffusers class, and the values it gets where the source's configuration says nothing
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}

SCHEDULER_NAMES: tuple[str, ...] = tuple(_CLASSES)


def make_scheduler(name: str | None, source_config: Mapping[str, Any]) -> Any:
    """The scheduler that a command asked for, with the noise schedule that the model was trained on.

    Args:
        name: one of `SCHEDULER_NAMES`, or None for the source's own.
        source_config: the source's ``scheduler_config.json`` (or a diffusers scheduler's ``config``).

    Returns:
        A diffusers scheduler.

    Raises:
        SdqError: no such name, or the source names a class that diffusers does not have.
    """
    config = dict(source_config)
    if name is None:
        return _class(str(config.get("_class_name"))).from_config(config)
    if name not in _CLASSES:
        raise SdqError(
            f"There is no scheduler {name!r}.",
            f"The schedulers are {', '.join(SCHEDULER_NAMES)}; leave it out for the model's own.",
        )
    class_name, defaults = _CLASSES[name]
    missing = {key: value for key, value in defaults.items() if key not in config}
    return _class(class_name).from_config({**config, **missing})


def saved_scheduler(class_name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler that a checkpoint or a manifest records, by diffusers' class and its whole configuration.

    Raises:
        SdqError: diffusers has no such class.
    """
    return _class(class_name).from_config(dict(config))


def _class(class_name: str) -> Any:
    found = getattr(diffusers, class_name, None)
    if found is None or not hasattr(found, "set_timesteps"):
        raise SdqError(
            f"The model's scheduler class {class_name!r} is none of diffusers {diffusers.__version__}.",
            f"Choose one with --scheduler: {', '.join(SCHEDULER_NAMES)}.",
        )
    return found
