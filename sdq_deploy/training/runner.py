"""Runs a method's stages in order; skips those whose inputs have not changed; says where a run stands."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sdq_deploy.recipes.schema import Fit, Method
from sdq_deploy.training.calibrate import calibrate
from sdq_deploy.training.collect import collect
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.fit import fit
from sdq_deploy.training.methods.efficientdm import adapter_training, shared_fit
from sdq_deploy.training.methods.ptq import ptq
from sdq_deploy.training.methods.reconstruction import reconstruct
from sdq_deploy.training.precompute import precompute
from sdq_deploy.training.save import save
from sdq_deploy.training.sensitivity import sensitivity
from sdq_export.checkpoint import CHECKPOINT_FOLDER

__all__ = ["STAGES", "Stage", "run_stages", "stage_hashes"]

#: Part of every hash: raised when a stage's result changes for the same inputs.
FORMAT = 2


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as shown and recorded.
        run: does the work; called with the hash of the stage's inputs. Figures that it returns go into run.json.
        inputs: what the result depends on, beside the stages in `after`; JSON values.
        after: stages whose results this one reads.
        everywhere: whether all processes work on it; otherwise the main one, while the others wait.
    """

    name: str
    run: Callable[[TrainingContext, str], dict[str, Any] | None]
    inputs: Callable[[TrainingContext], Any]
    after: tuple[str, ...] = ()
    everywhere: bool = False


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


def _fit_values(recipe: Fit) -> dict[str, Any]:
    """What of the section decides the result. FP32 moments, the only kind of earlier versions, are not named."""
    values = recipe.model_dump(mode="json", exclude={"checkpoint_every", "offload_teacher"})
    return {key: value for key, value in values.items() if (key, value) != ("optimizer_state", "fp32")}


def _fit_inputs(context: TrainingContext) -> Any:
    fit_recipe = _fit_values(context.recipe.fit)
    return [fit_recipe, context.recipe.freezing.model_dump(mode="json"), context.seed]


def _efficientdm_inputs(context: TrainingContext) -> Any:
    recipe = context.recipe
    shared = _fit_values(shared_fit(recipe.fit, recipe.efficientdm))
    return [recipe.method, shared, recipe.efficientdm.model_dump(mode="json"), context.seed]


def _ptq_inputs(context: TrainingContext) -> Any:
    return [context.recipe.method, context.recipe.ptq.model_dump(mode="json")]


def _reconstruction_inputs(context: TrainingContext) -> Any:
    settings = context.recipe.reconstruction.model_dump(mode="json", exclude={"checkpoint_every"})
    return [context.recipe.method, settings, context.seed]


_COLLECT = Stage("collect", collect, _collect_inputs, everywhere=True)
_PRECOMPUTE = Stage("precompute", lambda context, _: precompute(context), lambda _: None, ("collect",))
_CALIBRATE = Stage("calibrate", lambda context, _: calibrate(context), _calibrate_inputs, ("collect",))
_SENSITIVITY = Stage(
    "sensitivity",
    lambda context, _: sensitivity(context),
    lambda context: context.recipe.sensitivity.model_dump(mode="json"),
    ("collect", "calibrate"),
)
_SAVE = Stage("save", lambda context, _: save(context), lambda context: context.source_ref.model_dump(), ("fit",))
_DATA = ("collect", "calibrate")

#: What differs between the methods is "fit", the stage that finds integers and scales, and what it needs beforehand.
STAGES: dict[Method, tuple[Stage, ...]] = {
    "s2p": (
        _COLLECT,
        _PRECOMPUTE,
        _CALIBRATE,
        _SENSITIVITY,
        Stage("fit", fit, _fit_inputs, (*_DATA, "sensitivity"), everywhere=True),
        _SAVE,
    ),
    "ptq": (_COLLECT, _PRECOMPUTE, _CALIBRATE, Stage("fit", ptq, _ptq_inputs, _DATA), _SAVE),
    "ptq-reconstruction": (
        _COLLECT,
        _PRECOMPUTE,
        _CALIBRATE,
        Stage("fit", reconstruct, _reconstruction_inputs, _DATA),
        _SAVE,
    ),
    "efficientdm": (
        _COLLECT,
        _PRECOMPUTE,
        _CALIBRATE,
        Stage("fit", partial(fit, make_plan=adapter_training), _efficientdm_inputs, _DATA, everywhere=True),
        _SAVE,
    ),
}


def stage_hashes(context: TrainingContext) -> dict[str, str]:
    """The hash of each stage's inputs, those of the stages it reads included."""
    hashes: dict[str, str] = {}
    for stage in STAGES[context.recipe.method]:
        content = [FORMAT, stage.name, stage.inputs(context), [hashes[name] for name in stage.after]]
        hashes[stage.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return hashes


def run_stages(context: TrainingContext, settings: dict[str, Any]) -> list[str]:
    """Bring a run to its end.

    Args:
        context: the training.
        settings: recorded in run.json, so that --resume needs no options.

    Returns:
        Names of the stages that had to run.
    """
    hashes, ran = stage_hashes(context), []
    main = context.accelerator.is_main_process
    status = _agreed(context.folder.read_status())
    status["settings"], status["method"] = settings, context.recipe.method
    for stage in STAGES[context.recipe.method]:
        entry = status["stages"].get(stage.name, {})
        if entry.get("done") and entry.get("inputs") == hashes[stage.name]:
            continue
        status["status"] = stage.name
        status["stages"][stage.name] = {"inputs": hashes[stage.name], "done": False, "seconds": 0.0}
        if main:
            _withdraw_result(context)
            context.folder.write_status(status)
        started = time.perf_counter()
        context.accelerator.wait_for_everyone()
        figures = stage.run(context, hashes[stage.name]) if stage.everywhere or main else None
        context.accelerator.wait_for_everyone()
        status["stages"][stage.name] |= {"done": True, "seconds": round(time.perf_counter() - started, 2)}
        if figures:
            status["stages"][stage.name]["measured"] = figures
        ran.append(stage.name)
        if main:
            context.folder.write_status(status)
    status["status"] = "complete"
    if main:
        context.folder.write_status(status)
    return ran


def _agreed(status: dict[str, Any]) -> dict[str, Any]:
    """The main process's word: on another node run.json may be seen as it was a minute ago, and processes that
    disagree about what is done wait for each other forever."""
    from accelerate.utils import broadcast_object_list

    shared: dict[str, Any] = broadcast_object_list([status])[0]
    return shared


def _withdraw_result(context: TrainingContext) -> None:
    """A checkpoint of earlier inputs must not be exported as this run's."""
    shutil.rmtree(context.folder.path / CHECKPOINT_FOLDER, ignore_errors=True)
