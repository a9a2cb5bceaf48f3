"""Reading recipes: a file, then the precision's own table, then the command line; all mistakes in one report."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdq_deploy.recipes.report import describe_errors
from sdq_deploy.recipes.schema import Recipe
from sdq_engines.errors import SdqError
from sdq_engines.formats import PRECISIONS

__all__ = ["available_recipes", "load_recipe", "parse_assignments", "read_recipe", "recipe_from", "with_overrides"]

Tree = dict[str, Any]


def available_recipes() -> list[str]:
    """Names of the recipes that come with sdq-deploy."""
    folder = resources.files("sdq_deploy.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name or file, with `overrides` (dotted key -> value) on top.

    A table named after a precision holds the values that differ for it. Precedence, last wins: the file, the
    precision's table, the overrides.

    Raises:
        SdqError: no such recipe, not TOML, or values that are not allowed; every mistake is named in one report.
    """
    return recipe_from(with_overrides(read_recipe(name), overrides), str(name))


def read_recipe(name: str | Path) -> Tree:
    """The tree of the recipe of that name or file, unchecked.

    Raises:
        SdqError: no such recipe, or not TOML.
    """
    if str(name) in available_recipes():
        text = resources.files("sdq_deploy.recipes").joinpath(f"{name}.toml").read_text("utf-8")
    else:
        text = _read_file(Path(name))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SdqError(f"The recipe {name} is not valid TOML: {error}.", "Correct that line.") from error


def with_overrides(tree: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> Tree:
    """A recipe's tree with `overrides` on top of it and of each precision's table.

    So it can be recorded, and resolved later for another precision: that one's table counts then, and what was
    overridden stays overridden.
    """
    given = _nest(overrides or {})
    merged = _merge(dict(tree), given)
    in_tables = _without_precisions(given)
    if isinstance(quantization := in_tables.get("quantization"), Mapping):
        in_tables["quantization"] = {key: value for key, value in quantization.items() if key != "precision"}
    tables = {key: merged[key] for key in PRECISIONS if isinstance(merged.get(key), dict)}
    return merged | {key: _merge(table, in_tables) for key, table in tables.items()}


def recipe_from(tree: Mapping[str, Any], origin: str, options: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a parsed file, or of the tree that a run recorded.

    Args:
        tree: its tables.
        origin: names it in messages.
        options: dotted key -> the option of the command line that its value came from, which is named in its place.

    Raises:
        SdqError: values that are not allowed, every mistake in one report.
    """
    base = _without_precisions(tree)
    variants = {key: tree[key] for key in PRECISIONS if isinstance(tree.get(key), Mapping)}
    problems = [f"{key}: found {tree[key]!r}; allowed: a table" for key in PRECISIONS if key in tree.keys() - variants]
    quantization = base.get("quantization")
    chosen = quantization.get("precision") if isinstance(quantization, Mapping) else None
    recipe = _validate(_merge(base, variants.get(str(chosen), {})), problems)
    for key, variant in variants.items():
        if key != chosen:
            _validate(_merge(base, variant), problems)
    if problems or recipe is None:
        lines = list(dict.fromkeys(problems))
        if sentences := _of_options(lines, options or {}):
            raise SdqError(" ".join(sentences), "Give another value, or leave the option out for the recipe's own.")
        raise SdqError(
            f"The recipe {origin} has {len(lines)} mistake{'s' if len(lines) > 1 else ''}:\n  " + "\n  ".join(lines),
            "Correct them in the recipe, or with --set key=value.",
        )
    return recipe


def _of_options(lines: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """The mistakes as sentences about options; empty where one is about something else."""
    split = [(line.partition(": "), re.search(r": found (.*); allowed: (.*)$", line)) for line in lines]
    sentences = [
        f"{options[key]} takes {found[2]}, not {found[1]}."
        for (key, _, _), found in split
        if found is not None and key in options
    ]
    return sentences if len(sentences) == len(lines) else []


def parse_assignments(assignments: Sequence[str]) -> Tree:
    """`--set` options, "section.key=value" with a TOML value (a bare word is a string), as dotted key -> value."""
    values: Tree = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise SdqError(f"--set {assignment!r} is not of the form key=value.", "Example: --set fit.batch_size=16")
        values[key.strip()] = _toml_value(text.strip())
    return values


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        known = ", ".join(available_recipes())
        raise SdqError(f"There is no recipe {path}.", f"Give a TOML file, or one of {known}.") from error
    except UnicodeDecodeError as error:
        raise SdqError(f"The recipe {path} is not UTF-8 text.", "Save it as UTF-8.") from error
    except OSError as error:
        raise SdqError(f"The recipe {path} cannot be read: {error.strerror}.", "Give another --recipe.") from error


def _nest(values: Mapping[str, Any]) -> Tree:
    """Dotted keys to nested tables. A glob of `quantization.bits` keeps its own dots."""
    tree: Tree = {}
    for key, value in values.items():
        parts = key.split(".", 2) if key.startswith("quantization.bits.") else key.split(".")
        table = tree
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise SdqError(f"{key} cannot be set beside {part}, which was set as a whole.", "Set one of the two.")
        table[parts[-1].strip('"')] = value
    return tree


def _without_precisions(tree: Mapping[str, Any]) -> Tree:
    return {key: value for key, value in tree.items() if key not in PRECISIONS}


def _merge(base: Tree, over: Mapping[str, Any]) -> Tree:
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _validate(tree: Tree, problems: list[str]) -> Recipe | None:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems.extend(describe_errors(Recipe, error))
        return None
