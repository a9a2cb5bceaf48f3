"""The stages that all methods share, in order; between them a method puts its own `fit`."""

from __future__ import annotations

from typing import Any

from sdq_deploy.recipes.schema import Fit
from sdq_deploy.training.calibrate import calibrate
from sdq_deploy.training.collect import collect
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.method import Stage, TrainingMethod
from sdq_deploy.training.precompute import precompute
from sdq_deploy.training.save import save
from sdq_deploy.training.sensitivity import sensitivity

__all__ = ["DATA", "fit_values", "stages_of"]

#: What every fit reads.
DATA = ("collect", "calibrate")


def _collect_inputs(context: TrainingContext) -> Any:
    recipe = context.recipe
    return [
        context.source.sha256,
        context.sampler_settings.model_dump(mode="json"),
        recipe.collect.model_dump(mode="json"),
        context.prompt_hash,
        context.seed,
        context.text.model_dump(mode="json"),
        [[embedding.name, embedding.sha256] for embedding in context.source.embeddings],
    ]


def _calibrate_inputs(context: TrainingContext) -> Any:
    settings = context.recipe.calibrate.model_dump(mode="json") | {"smoothing": context.smoothing}
    return [context.spec.model_dump(mode="json"), settings]


def fit_values(recipe: Fit) -> dict[str, Any]:
    """What of the section decides a fit's result."""
    return recipe.model_dump(mode="json", exclude={"checkpoint_every", "offload_teacher"})


_COLLECT = Stage("collect", collect, _collect_inputs, everywhere=True)
_PRECOMPUTE = Stage[TrainingContext]("precompute", lambda context, _: precompute(context), lambda _: None, ("collect",))
_CALIBRATE = Stage("calibrate", lambda context, _: calibrate(context), _calibrate_inputs, ("collect",))
_SENSITIVITY = Stage[TrainingContext](
    "sensitivity",
    lambda context, _: sensitivity(context),
    lambda context: context.recipe.sensitivity.model_dump(mode="json"),
    ("collect", "calibrate"),
)
_SAVE = Stage[TrainingContext](
    "save", lambda context, _: save(context), lambda context: context.source_ref.model_dump(), ("fit",)
)


def stages_of(method: TrainingMethod[TrainingContext]) -> tuple[Stage[TrainingContext], ...]:
    """What a run by this method does, in order."""
    before = (_COLLECT, _PRECOMPUTE, _CALIBRATE, *((_SENSITIVITY,) if method.uses_sensitivity else ()))
    return (*before, method.fit, _SAVE)
