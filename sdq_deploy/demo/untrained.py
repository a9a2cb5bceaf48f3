"""A run's checkpoint as it would be without training, by the method `ptq` at the same sites and on the same data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sdq_deploy.models import resolve_model
from sdq_deploy.recipes.load import recipe_from
from sdq_deploy.recipes.schema import PtqAlgorithm
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.methods.ptq import candidates
from sdq_deploy.training.prepare import kept_embeddings
from sdq_deploy.training.run import make_accelerator, read_settings
from sdq_deploy.training.student import Student
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import CheckpointInfo
from sdq_export.source import Source, load_source

__all__ = ["ALGORITHMS", "quantize_without_training"]

#: Algorithms that have one candidate, and what a table calls them.
ALGORITHMS: dict[PtqAlgorithm, str] = {
    "search": "weight search and per-step scales",
    "max": "ModelOpt max",
    "mse": "ModelOpt mse",
}


def quantize_without_training(
    run: Path, algorithm: PtqAlgorithm, source: Source | None = None
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """What a quantized checkpoint holds, for a run's sites and serial dataset, but without training.

    Args:
        run: a training run whose stages up to calibrate are done.
        algorithm: one of `ALGORITHMS`; "search" is where training starts from.
        source: the run's source checkpoint, if it is loaded already.

    Raises:
        SdqError: the run has not got that far.
    """
    context = _context_of(run, algorithm, source)
    candidate = next(candidates(context, load_split(context.folder.dataset, "training")))
    tensors = Student(candidate.denoiser, context.timesteps, context.spec, candidate.scales).tensors()
    info = CheckpointInfo(
        spec=context.spec,
        sampler=context.sampler_settings,
        source=context.source_ref,
        text=context.text,
        notes={"untrained": algorithm},
    )
    return info, tensors


def _context_of(run: Path, algorithm: PtqAlgorithm, source: Source | None) -> TrainingContext:
    from rich.progress import Progress

    recorded = read_settings(run)
    recipe = recipe_from(recorded.get("recipe", {}), str(run))
    settings = TrainingSettings(
        model=recorded.get("model", ""),
        out=run,
        recipe=recipe.model_copy(
            update={"method": "ptq", "ptq": recipe.ptq.model_copy(update={"algorithm": algorithm})}
        ),
        prompts=tuple(recorded.get("prompts", ())),
        seed=recorded.get("seed", 0),
        revision=recorded.get("revision"),
        embeddings=kept_embeddings(run, recorded),
    )
    folder = RunFolder(run)
    where = folder.model if folder.prepared.is_file() else resolve_model(settings.model)
    loaded = source or load_source(where, settings.revision)
    context = TrainingContext(settings, loaded, make_accelerator(settings.recipe, cpu=True), Progress(disable=True))
    if not context.folder.scales.is_file():
        raise SdqError(f"The run {run} is not calibrated yet.", "Continue it with: sdq-deploy train … --resume")
    return context
