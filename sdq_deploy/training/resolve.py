"""From what the user typed, and what a resumed run recorded, to the settings of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdq_deploy.lora import Lora
from sdq_deploy.models import EMBEDDED, no_single_file
from sdq_deploy.recipes.load import read_recipe, recipe_from, with_overrides
from sdq_deploy.recipes.schema import Recipe
from sdq_deploy.training.context import TrainingSettings
from sdq_deploy.training.prepare import base_identity, kept_embeddings
from sdq_deploy.training.prompt_files import read_prompts
from sdq_deploy.training.prompts import shapes_prompts
from sdq_deploy.training.run import read_settings
from sdq_engines.errors import SdqError
from sdq_export.conversion import family_of_file
from sdq_export.embeddings import parse_embedding
from sdq_export.single_file import FromFile, is_single_file

__all__ = ["default_recipe", "resolve_settings"]


def default_recipe(model: str, revision: str | None = None, from_file: FromFile | None = None) -> str:
    """The recipe of a model's family.

    Raises:
        SdqError: the model does not exist, or is of no supported family.
    """
    if model == EMBEDDED:
        return EMBEDDED
    from sdq_export.source import load_source

    if is_single_file(model):
        return family_of_file(Path(model), from_file or FromFile()).recipe
    return load_source(model, revision).family.recipe


def resolve_settings(
    model: str,
    out: Path,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
    prompt_file: Path | None = None,
    prompt_column: str | None = None,
    seed: int | None = None,
    revision: str | None = None,
    embeddings: Sequence[str] = (),
    loras: Sequence[Lora] = (),
    from_file: FromFile | None = None,
    resume: bool = False,
) -> TrainingSettings:
    """Settle every value. A resumed run keeps its recipe, prompts, seed, adapters and embeddings but for what is
    given here.

    Args:
        model: as the user named it.
        out: the run's folder.
        recipe: a recipe's name or file; None takes the run's, or that of the model's family.
        overrides: dotted key -> value on top of the recipe.
        options: dotted key -> the option of the command line that its value came from, for messages.
        prompt_file, prompt_column: where prompts come from.
        seed: of data and training.
        revision: of a hub model.
        embeddings: textual inversions, NAME=FILE each.
        loras: adapters to fuse.
        from_file: how a model that is one file is converted.
        resume: go on with what `out` holds.

    Raises:
        SdqError: mistakes in the recipe, the prompts or the embeddings; the run folder trains another model.
    """
    # An absolute path, for the checkpoint has to find its source from anywhere.
    named = str(Path(model).resolve()) if model != EMBEDDED and Path(model).exists() else model
    recorded = read_settings(out) if resume else {}
    if from_file is not None and from_file.given and not is_single_file(model):
        raise no_single_file(model)
    if from_file is None or not from_file.given:
        from_file = FromFile.model_validate(recorded.get("from_file", {}))
    if recorded and recipe is None:
        tree, origin = recorded["recipe"], str(out)
    else:
        origin = recipe or default_recipe(model, revision, from_file)
        tree = read_recipe(origin)
    tree = with_overrides(tree, overrides)
    chosen = recipe_from(tree, origin, options)
    settings = TrainingSettings(
        model=named,
        out=out,
        recipe=chosen,
        recipe_tree=tree,
        prompts=_prompts(model, chosen, prompt_file, prompt_column, recorded),
        seed=seed if seed is not None else recorded.get("seed", 0),
        revision=revision or recorded.get("revision"),
        embeddings=tuple(map(parse_embedding, embeddings)) or kept_embeddings(out, recorded),
        loras=tuple(loras) or tuple(_recorded_lora(each) for each in recorded.get("loras", ())),
        from_file=from_file,
    )
    # a model that was moved is known by its hash
    if recorded and recorded["model"] != named and recorded.get("identity") != base_identity(settings):
        raise SdqError(f"The run {out} trains {recorded['model']}, not {named}.", "Give its model, or another --out.")
    return settings


def _recorded_lora(entry: Mapping[str, Any]) -> Lora:
    return Lora(Path(entry["path"]), entry["weight"], entry["sha256"])


def _prompts(
    model: str, recipe: Recipe, prompt_file: Path | None, column: str | None, recorded: Mapping[str, Any]
) -> tuple[str, ...]:
    if prompt_file is not None:
        return tuple(read_prompts(prompt_file, column))
    if model == EMBEDDED:
        return tuple(shapes_prompts(recipe.collect.num_prompts, recipe.collect.validation_prompts))
    if recorded:
        return tuple(recorded["prompts"])
    raise SdqError(
        "Training needs prompts like those that the model will be used with, and none were given.",
        "Write some hundred of them into a text file, one per line, or into a table's column: --prompts FILE",
    )
