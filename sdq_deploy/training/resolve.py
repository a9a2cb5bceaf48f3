"""From what the user typed, and what a resumed run recorded, to the settings of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdq_deploy.models import EMBEDDED
from sdq_deploy.recipes.load import read_recipe, recipe_from, with_overrides
from sdq_deploy.recipes.schema import Recipe
from sdq_deploy.training.context import TrainingSettings
from sdq_deploy.training.prompts import read_prompts, shapes_prompts
from sdq_deploy.training.run import read_settings
from sdq_engines.errors import SdqError

__all__ = ["default_recipe", "resolve_settings"]


def default_recipe(model: str, revision: str | None = None) -> str:
    """The recipe of a model's family.

    Raises:
        SdqError: the model does not exist, or is of no supported family.
    """
    if model == EMBEDDED:
        return EMBEDDED
    from sdq_export.source import load_source

    return load_source(model, revision).family.recipe


def resolve_settings(
    model: str,
    out: Path,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    prompt_file: Path | None = None,
    seed: int | None = None,
    revision: str | None = None,
    resume: bool = False,
) -> TrainingSettings:
    """Settle every value. A resumed run keeps its recipe, prompts and seed but for what is given here.

    Raises:
        SdqError: mistakes in the recipe or the prompts; the run folder trains another model.
    """
    # An absolute path, for the checkpoint has to find its source from anywhere.
    named = str(Path(model).resolve()) if model != EMBEDDED and Path(model).exists() else model
    recorded = read_settings(out) if resume else {}
    if recorded and recorded["model"] != named:
        raise SdqError(f"The run {out} trains {recorded['model']}, not {named}.", "Give its model, or another --out.")
    if recorded and recipe is None:
        tree, origin = recorded["recipe"], str(out)
    else:
        origin = recipe or default_recipe(model, revision)
        tree = read_recipe(origin)
    tree = with_overrides(tree, overrides)
    chosen = recipe_from(tree, origin)
    return TrainingSettings(
        model=named,
        out=out,
        recipe=chosen,
        recipe_tree=tree,
        prompts=_prompts(model, chosen, prompt_file, recorded),
        seed=seed if seed is not None else recorded.get("seed", 0),
        revision=revision or recorded.get("revision"),
    )


def _prompts(model: str, recipe: Recipe, prompt_file: Path | None, recorded: Mapping[str, Any]) -> tuple[str, ...]:
    if prompt_file is not None:
        return tuple(read_prompts(prompt_file))
    if model == EMBEDDED:
        return tuple(shapes_prompts(recipe.collect.num_prompts, recipe.collect.validation_prompts))
    if recorded:
        return tuple(recorded["prompts"])
    raise SdqError(
        "Training needs prompts like those that the model will be used with, and none were given.",
        "Write some hundred of them into a text file, one per line, and give it with --prompts FILE.",
    )
