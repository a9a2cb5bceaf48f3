"""Runs a method's stages in order; skips those whose inputs have not changed; says where a run stands."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from typing import Any

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.stages import stages_of
from sdq_export.checkpoint import CHECKPOINT_FOLDER

__all__ = ["run_stages", "stage_hashes"]

#: Part of every hash: raised when a stage's result changes for the same inputs.
FORMAT = 2


def stage_hashes(context: TrainingContext) -> dict[str, str]:
    """The hash of each stage's inputs, those of the stages it reads included."""
    hashes: dict[str, str] = {}
    for stage in stages_of(context.method):
        content = [FORMAT, stage.name, stage.inputs(context), [hashes[name] for name in stage.after]]
        hashes[stage.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return hashes


def run_stages(
    context: TrainingContext, settings: dict[str, Any], on_stage: Callable[[str], None] = lambda name: None
) -> list[str]:
    """Bring a run to its end.

    Args:
        context: the training.
        settings: recorded in run.json, so that --resume needs no options.
        on_stage: hears the name of each stage that has to run.

    Returns:
        Names of the stages that had to run.
    """
    hashes, ran = stage_hashes(context), []
    main = context.accelerator.is_main_process
    status = _agreed(context.folder.read_status())
    status["settings"], status["method"] = settings, context.recipe.method
    for stage in stages_of(context.method):
        entry = status["stages"].get(stage.name, {})
        if entry.get("done") and entry.get("inputs") == hashes[stage.name]:
            continue
        on_stage(stage.name)
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
