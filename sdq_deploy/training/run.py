"""One training from settings to quantized checkpoint: what `sdq-deploy train` and the demo call."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdq_deploy.display.consoles import new_progress
from sdq_deploy.libraries import quiet_libraries
from sdq_deploy.models import open_model
from sdq_deploy.processes import LONGEST_WAIT
from sdq_deploy.recipes.schema import Recipe
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.dataset import INDEX
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.optimizer import check_optimizer
from sdq_deploy.training.prepare import is_prepared, keep_embeddings, prepare_model
from sdq_deploy.training.registry import method_named
from sdq_deploy.training.runner import run_stages
from sdq_engines.errors import SdqError
from sdq_engines.files import claimed_folder
from sdq_engines.in_progress import WorkInProgress, in_progress, what_was_killed
from sdq_export.source import Source

__all__ = ["make_accelerator", "read_settings", "recorded_settings", "run_training"]

_SAVES_MEMORY = "What saves memory is in docs/training-at-size.md."


def make_accelerator(recipe: Recipe, *, cpu: bool = False) -> Any:
    """accelerate's view of this process's devices, with the recipe's mixed precision.

    Raises:
        SdqError: it was launched with a strategy that cuts the model into pieces.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    # Some stages run in the main process while the others wait, at real size longer than the default of 10 minutes.
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    _refuse_sharding()
    # A second training of this process may have another precision; the group of processes stays as it is.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=recipe.fit.mixed_precision, cpu=cpu, kwargs_handlers=[waiting])


def _refuse_sharding() -> None:
    """Freezing, the checkpoint and the resume point look at whole weights: every process holds the whole student."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise SdqError(
                f"Training under {name}, which cuts the student into pieces, is not supported.",
                "Launch it with accelerate launch --multi_gpu; see docs/training-at-size.md for what saves memory.",
            )


def run_training(
    settings: TrainingSettings,
    *,
    source: Source | None = None,
    resume: bool = False,
    dataset: Path | None = None,
    cpu: bool = False,
    quiet: bool = False,
) -> list[str]:
    """Run every stage that is not done yet.

    Args:
        settings: what to train, where.
        source: the loaded checkpoint; None loads `settings.model`.
        resume: continue what the output folder holds.
        dataset: another run, whose serial dataset is taken over where it fits.
        cpu: stay on the CPU.
        quiet: show no progress.

    Returns:
        Names of the stages that had to run.

    Raises:
        SdqError: the output is not ours, holds a run and `resume` is not given, or the settings do not work;
            the method does not fit the precision or the processes; another training writes to the output.
        KeyboardInterrupt: with the command that continues as its message.
    """
    quiet_libraries()
    check_optimizer(settings.recipe.fit)
    accelerator = make_accelerator(settings.recipe, cpu=cpu)
    method_named(settings.recipe.method).check(settings.recipe, accelerator.num_processes)
    killed = what_was_killed(settings.out) if accelerator.is_main_process else None
    with _at_work(settings, resume, killed) if accelerator.is_main_process else contextlib.nullcontext() as work:
        accelerator.wait_for_everyone()
        progress = new_progress()
        progress.disable = quiet or not accelerator.is_main_process
        try:
            with progress:
                if killed is not None and not progress.disable:
                    progress.console.print(f"{killed} {_SAVES_MEMORY}", markup=False, soft_wrap=True)
                on_stage = work.stage if work is not None else lambda name: None
                return _train(settings, source, dataset, accelerator, progress, on_stage)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"Continue with: {resume_command(settings)}") from interrupt


def _train(
    settings: TrainingSettings,
    source: Source | None,
    dataset: Path | None,
    accelerator: Any,
    progress: Any,
    on_stage: Callable[[str], None],
) -> list[str]:
    on_stage("prepare")
    loaded, ran = _model(settings, source, accelerator, progress)
    loaded.family.check()  # what could not be exported is not trained
    context = TrainingContext(settings, loaded, accelerator, progress)
    if accelerator.is_main_process:
        keep_embeddings(settings, recorded_settings(settings))
    with _restored_denoiser(context):
        if dataset is not None and accelerator.is_main_process:
            _adopt_dataset(context, dataset)
        accelerator.wait_for_everyone()
        identity = context.folder.read_identity() if is_prepared(settings) else loaded.sha256
        return [*ran, *run_stages(context, recorded_settings(settings) | {"identity": identity}, on_stage)]


def _model(
    settings: TrainingSettings, source: Source | None, accelerator: Any, progress: Any
) -> tuple[Source, list[str]]:
    """The model to train, and the stages that had to run for it."""
    if source is not None:
        return source, []
    if is_prepared(settings):
        return prepare_model(settings, accelerator, progress, recorded_settings(settings))
    return open_model(settings.model, settings.revision), []


@contextlib.contextmanager
def _at_work(settings: TrainingSettings, resume: bool, killed: str | None) -> Iterator[WorkInProgress]:
    """The run's folder for a block; another training of it is refused meanwhile, and a kill leaves word."""
    with _claimed(settings, resume, killed), in_progress(settings.out, "training") as work:
        yield work


@contextlib.contextmanager
def _claimed(settings: TrainingSettings, resume: bool, killed: str | None) -> Iterator[None]:
    with claimed_folder(settings.out, "run", "train") as out:
        folder = RunFolder(out)
        if folder.status_file.is_file() and not resume:
            status = folder.read_status()["status"]
            export = f"Export it: sdq-deploy export {_quoted(str(settings.out))} --out PACKAGE, or train it further"
            advice = "Continue it" if status != "complete" else export
            raise SdqError(
                f"{settings.out} already holds a training (status: {status}).{f' {killed}' if killed else ''}",
                f"{advice} with: {resume_command(settings)}, or give another --out.",
            )
        yield


def resume_command(settings: TrainingSettings) -> str:
    """The command that continues this training."""
    return f"sdq-deploy train {_quoted(settings.model)} --out {_quoted(str(settings.out))} --resume"


def read_settings(out: Path) -> dict[str, Any]:
    """The settings that a run folder records: model, revision, recipe, prompts, seed; empty where there is none."""
    recorded: dict[str, Any] = RunFolder(out).read_status()["settings"]
    return recorded


def recorded_settings(settings: TrainingSettings) -> dict[str, Any]:
    """What run.json keeps of the settings, and `read_settings` finds again."""
    return {
        "model": settings.model,
        "revision": settings.revision,
        "loras": [{"path": str(lora.path), "weight": lora.weight, "sha256": lora.sha256} for lora in settings.loras],
        "from_file": settings.from_file.model_dump(mode="json"),
        "recipe": settings.recipe_tree or settings.recipe.model_dump(mode="json"),
        "prompts": list(settings.prompts),
        "seed": settings.seed,
        "embeddings": [{"name": each.name, "sha256": each.sha256} for each in settings.embeddings],
    }


@contextlib.contextmanager
def _restored_denoiser(context: TrainingContext) -> Any:
    """Leave the source's modules on the CPU, where the caller had them."""
    try:
        yield
    finally:
        context.source.denoiser.to("cpu")


def _adopt_dataset(context: TrainingContext, other: Path) -> None:
    """Copy another run's serial dataset; the collect stage then keeps the shards that fit.

    Raises:
        SdqError: there is no such run.
    """
    source, target = RunFolder(other).dataset, context.folder.dataset
    if not RunFolder(other).status_file.is_file():
        raise SdqError(f"{other} is not a training run: it has no run.json.", "Give --dataset another run's folder.")
    if not (source / INDEX).is_file() or (target / INDEX).is_file():
        return
    for path in source.rglob("*.safetensors"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
