"""Quantized checkpoints without training, at the same sites: what the trained one is compared with."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sdq_deploy.models import resolve_model
from sdq_deploy.recipes.load import recipe_from
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.methods.modelopt_scales import ModeloptAlgorithm, modelopt_scales
from sdq_deploy.training.run import make_accelerator, read_settings
from sdq_deploy.training.student import Student
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import CheckpointInfo
from sdq_export.quantspec import QuantSpec
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser

__all__ = ["METHODS", "quantize_without_training"]

#: Where initial scales can come from, and what a table calls it. ModelOpt knows no steps: one scale per activation.
METHODS: dict[str, str] = {
    "search": "weight search and per-step scales",
    "modelopt-max": "ModelOpt max",
    "modelopt-mse": "ModelOpt mse",
}

#: Latents per step that ModelOpt calibrates on.
SAMPLES_PER_STEP = 16


def quantize_without_training(
    run: Path, method: str, source: Source | None = None
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """What a quantized checkpoint holds, for a run's sites and serial dataset, but without training.

    Args:
        run: a training run whose stages up to calibrate are done.
        method: one of `METHODS`; "search" is where training starts from.
        source: the run's source checkpoint, if it is loaded already.

    Raises:
        SdqError: the run has not got that far.
    """
    context = _context_of(run, source)
    spec = context.spec
    if method == "search":
        scales = load_file(context.folder.scales)
    else:
        spec = _one_group(spec)
        data = load_split(context.folder.dataset, "training")
        teacher = StepDenoiser(copy.deepcopy(context.source.denoiser), context.timesteps)
        algorithm: ModeloptAlgorithm = "max" if method == "modelopt-max" else "mse"
        scales = modelopt_scales(teacher, spec, data, algorithm, SAMPLES_PER_STEP)
    tensors = Student(context.source.denoiser, context.timesteps, spec, scales).tensors()
    info = CheckpointInfo(
        spec=spec,
        sampler=context.sampler_settings,
        source=context.source_ref,
        text=context.text,
        notes={"untrained": method},
    )
    return info, tensors


def _context_of(run: Path, source: Source | None) -> TrainingContext:
    from rich.progress import Progress

    recorded = read_settings(run)
    settings = TrainingSettings(
        model=recorded.get("model", ""),
        out=run,
        recipe=recipe_from(recorded.get("recipe", {}), str(run)),
        prompts=tuple(recorded.get("prompts", ())),
        seed=recorded.get("seed", 0),
        revision=recorded.get("revision"),
        embeddings=tuple(recorded.get("embeddings", ())),
    )
    folder = RunFolder(run)
    where = folder.model if folder.prepared.is_file() else resolve_model(settings.model)
    loaded = source or load_source(where, settings.revision)
    context = TrainingContext(settings, loaded, make_accelerator(settings.recipe, cpu=True), Progress(disable=True))
    if not context.folder.scales.is_file():
        raise SdqError(f"The run {run} is not calibrated yet.", "Continue it with: sdq-deploy train … --resume")
    return context


def _one_group(spec: QuantSpec) -> QuantSpec:
    activations = tuple(site.model_copy(update={"groups": (0,) * spec.num_steps}) for site in spec.activations)
    return spec.model_copy(update={"activations": activations})
