"""Method s2p: serial-to-parallel quantization-aware training, the paper's and our own (docs/quantization.md)."""

from __future__ import annotations

from typing import Any

from torch import nn

from sdq_deploy.recipes.schema import Recipe
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.fit import fit
from sdq_deploy.training.method import Stage, TrainingMethod
from sdq_deploy.training.stages import DATA, fit_values
from sdq_export.quantspec import QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["METHOD"]


def _inputs(context: TrainingContext) -> Any:
    recipe = context.recipe
    return [fit_values(recipe.fit), recipe.freezing.model_dump(mode="json"), context.seed]


def _learning(denoiser: StepDenoiser, spec: QuantSpec, recipe: Recipe) -> list[nn.Parameter]:
    return list(denoiser.model.parameters())


METHOD = TrainingMethod(
    name="s2p",
    fit=Stage("fit", fit, _inputs, (*DATA, "sensitivity"), everywhere=True),
    groups=lambda recipe: recipe.quantization.groups,
    smooths=lambda recipe: True,
    uses_sensitivity=True,
    loop=lambda recipe: recipe.fit,
    learning=_learning,
    learns_student=True,
)
