"""Recipes: a family's settings for training, as TOML files typed by pydantic."""

from __future__ import annotations

from sdq_deploy.recipes.load import available_recipes, load_recipe, parse_assignments
from sdq_deploy.recipes.schema import Recipe

__all__ = ["Recipe", "available_recipes", "load_recipe", "parse_assignments"]
