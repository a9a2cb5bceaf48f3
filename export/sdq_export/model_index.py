"""model_index.json: which classes a checkpoint's parts are of, and what diffusers' pipeline makes of their settings."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from sdq_engines.errors import SdqError
from sdq_export.families import Family
from sdq_export.loading import naming

__all__ = ["part_class", "repair", "scheduler_class"]


def part_class(index: Mapping[str, Any], family: type[Family], name: str, model: str) -> Any:
    """The class that the index names for a part, if the family supports it.

    Raises:
        SdqError: it names none, or another class.
    """
    wanted = family.parts[name]
    named = _named(index, name)
    if named is None:
        raise SdqError(
            f"The model_index.json of {model} names no {name}; a {family.pipeline} has one.",
            f'Supported is "{name}": {list(wanted.split("."))}.'.replace("'", '"'),
        )
    if named.removesuffix("Fast") != wanted.removesuffix("Fast"):
        raise SdqError(
            f"The {name} of {model} is a {named}; supported is {wanted}.",
            "docs/families.md lists the parts of each family.",
        )
    library, _, kind = named.rpartition(".")
    return getattr(importlib.import_module(library), kind)


def scheduler_class(index: Mapping[str, Any], model: str) -> Any:
    """diffusers' class that the index names for the scheduler.

    Raises:
        SdqError: it names none, or diffusers has no such scheduler.
    """
    import diffusers

    named = _named(index, "scheduler")
    if named is None:
        raise SdqError(
            f"The model_index.json of {model} names no scheduler.",
            'Add one, for example "scheduler": ["diffusers", "DDIMScheduler"], and scheduler/scheduler_config.json.',
        )
    library, _, name = named.rpartition(".")
    kind = getattr(diffusers, name, None) if library == "diffusers" else None
    if not hasattr(kind, "set_timesteps"):
        raise SdqError(
            f"The scheduler of {model} is a {named}, which is no scheduler of diffusers {diffusers.__version__}.",
            "Name another in model_index.json.",
        )
    return kind


def repair(index: Mapping[str, Any], part: str, options: Mapping[str, Any], scheduler: Any, denoiser: Any) -> Any:
    """Let the constructor of the checkpoint's pipeline change the settings that it changes.

    diffusers' pipelines overwrite settings of old checkpoints (a scheduler's `steps_offset`, `clip_sample`,
    `skip_prk_steps`, a UNet's `sample_size`). The constructor is given these two parts and no others.

    Args:
        index: names the pipeline's class.
        part: what the pipeline calls its denoiser.
        options: of the constructor, beside the parts.
        scheduler: not changed; None for the denoiser alone.
        denoiser: with weights or without; its configuration is repaired in place.

    Returns:
        The repaired scheduler, whose `from_config(config)` is repaired too.
    """
    import diffusers

    kind = getattr(diffusers, index["_class_name"])
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    nothing = {each.name: None for each in parameters if each.default is inspect.Parameter.empty}
    repaired = copy.deepcopy(scheduler)
    given = {**nothing, **options, "scheduler": repaired, part: denoiser}
    with naming(f"A {kind.__name__} of these settings"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises the checkpoint's author
        kind(**given)
    if scheduler is not None:
        _keep_repairs(repaired, scheduler)
    return repaired


def _keep_repairs(repaired: Any, original: Any) -> None:
    """What the file left open is a default to diffusers, which `from_config` forgets; what was repaired is none."""
    changed = {key for key, value in repaired.config.items() if original.config.get(key) != value}
    defaults = [key for key in repaired.config.get("_use_default_values", ()) if key not in changed]
    if changed:
        repaired._internal_dict = type(repaired._internal_dict)(
            {**repaired._internal_dict, "_use_default_values": defaults}
        )


def _named(index: Mapping[str, Any], name: str) -> str | None:
    """``library.Class``; None where the index has no such part, or an empty one."""
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry):
        return ".".join(entry)
    return None
