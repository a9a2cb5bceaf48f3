"""Quantized checkpoints without training, at the same sites: what the trained one is compared with."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdq_deploy.models import resolve_model
from sdq_deploy.recipes.load import recipe_from
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.dataset import SerialData, load_split
from sdq_deploy.training.guidance import predict_outputs
from sdq_deploy.training.modelopt_backend import import_modelopt, only_conv_and_linear
from sdq_deploy.training.run import make_accelerator, read_settings
from sdq_deploy.training.student import Student
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import CheckpointInfo, scale_key, weight_scale_key
from sdq_export.quantspec import QuantSpec
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser

__all__ = ["METHODS", "modelopt_scales", "quantize_without_training"]

#: Where initial scales can come from, and what a table calls it. ModelOpt knows no steps: one scale per activation.
METHODS: dict[str, str] = {
    "search": "weight search and per-step scales",
    "modelopt-max": "ModelOpt max",
    "modelopt-mse": "ModelOpt mse",
}

#: Latents per step that ModelOpt calibrates on, and how many pass together.
SAMPLES_PER_STEP, BATCH = 16, 16


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
        teacher = StepDenoiser(copy.deepcopy(context.source.unet), context.timesteps)
        scales = modelopt_scales(teacher, spec, data, "max" if method == "modelopt-max" else "mse")
    tensors = Student(context.source.unet, context.timesteps, spec, scales).tensors()
    info = CheckpointInfo(
        spec=spec, sampler=context.sampler_settings, source=context.source_ref, notes={"untrained": method}
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
    )
    loaded = source or load_source(resolve_model(settings.model), settings.revision)
    context = TrainingContext(settings, loaded, make_accelerator(settings.recipe, cpu=True), Progress(disable=True))
    if not context.folder.scales.is_file():
        raise SdqError(f"The run {run} is not calibrated yet.", "Continue it with: sdq-deploy train … --resume")
    return context


def _one_group(spec: QuantSpec) -> QuantSpec:
    activations = tuple(site.model_copy(update={"groups": (0,) * spec.num_steps}) for site in spec.activations)
    return spec.model_copy(update={"activations": activations})


def modelopt_scales(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, algorithm: Literal["max", "mse"]
) -> dict[str, Tensor]:
    """Scales as ModelOpt's calibration finds them, under their checkpoint keys.

    Args:
        denoiser: floating-point; it is changed, hand in a copy.
        spec: the sites, with one scale group per activation.
        data: what the activations are calibrated on.
        algorithm: ModelOpt's: "max", or "mse", which searches the weights' range for the least squared error.
    """
    mtq = import_modelopt()
    config = {"quant_cfg": _modelopt_config(spec), "algorithm": {"method": algorithm}}
    quiet = io.StringIO()
    with (
        only_conv_and_linear(),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        mtq.quantize(denoiser.unet, config, lambda _: _run_over(denoiser, data, spec.num_steps))
    scales: dict[str, Tensor] = {}
    for weight in spec.weights:
        quantizer: Any = denoiser.unet.get_submodule(f"{weight.layer}.weight_quantizer")
        scale = _scale_of(quantizer.amax, weight.bits)
        rows = denoiser.unet.get_submodule(weight.layer)._parameters["weight"].shape[0]
        scales[weight_scale_key(weight.layer)] = scale if weight.block_size is None else scale.reshape(rows, -1)
    for site in spec.activations:
        amax = denoiser.unet.get_submodule(f"{site.consumers[0]}.input_quantizer").amax
        scales[scale_key(site.name)] = _scale_of(amax, site.bits)
    return scales


def _scale_of(amax: Tensor, bits: int) -> Tensor:
    """ModelOpt's step: the largest magnitude over Q_P. A channel of zeros gets any positive scale."""
    scale = amax.detach().float().cpu().flatten() / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale)).contiguous()


def _modelopt_config(spec: QuantSpec) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for site in spec.weights:
        shape: dict[str, Any] = {"axis": 0} if site.block_size is None else {"block_sizes": {-1: site.block_size}}
        entries.append({"quantizer_name": f"{site.layer}.weight_quantizer", "cfg": {"num_bits": site.bits, **shape}})
    entries += [
        {"quantizer_name": f"{layer}.input_quantizer", "cfg": {"num_bits": activation.bits}}
        for activation in spec.activations
        for layer in activation.consumers
    ]
    return entries


@torch.no_grad()
def _run_over(denoiser: StepDenoiser, data: SerialData, num_steps: int) -> None:
    """Show the denoiser latents of every step, with and without their prompts."""
    rows = torch.cat([data.at_step(step, SAMPLES_PER_STEP) for step in range(num_steps)])
    for part in torch.split(rows, BATCH):
        embeddings = data.embeddings[data.shard.prompt_ids[part]]
        empty = data.empty if data.guided else None
        predict_outputs(denoiser, data.shard.latents[part], data.shard.steps[part], embeddings, empty)
