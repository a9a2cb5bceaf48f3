"""Stage sensitivity: which layers cost the output most when they alone are quantized."""

from __future__ import annotations

import math

import torch
from safetensors.torch import load_file

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData, load_split
from sdq_deploy.training.outputs import outputs_on
from sdq_deploy.training.stored import Rows
from sdq_deploy.training.student import Student
from sdq_engines.files import atomic_write_json
from sdq_export.guidance import ModelOutputs

__all__ = ["layer_sqnr", "sensitivity"]


def sensitivity(context: TrainingContext) -> None:
    """Measure each layer's SQNR on held-out serial data; write all of them and the top k, most sensitive first."""
    scales = load_file(context.folder.scales)
    student = Student(context.source.denoiser, context.timesteps, context.spec, scales)
    student.denoiser.to(context.device)
    data = load_split(context.folder.dataset, "validation")
    rows = spread_rows(data, context.recipe.sensitivity.samples)
    layers = [site.layer for site in context.spec.weights]
    ratios: dict[str, float] = {}
    with context.bar("sensitivity", len(layers)) as advance:
        for layer in layers:
            ratios[layer] = layer_sqnr(student, data, rows, [layer])
            advance()
    ordered = sorted(ratios, key=lambda layer: ratios[layer])
    if context.accelerator.is_main_process:
        chosen = ordered[: context.recipe.sensitivity.top_k]
        atomic_write_json(
            context.folder.sensitivity, {"sensitive": chosen, "sqnr_db": {layer: ratios[layer] for layer in ordered}}
        )


def spread_rows(data: SerialData, count: int) -> torch.Tensor:
    """`count` latents spread evenly over steps and prompts."""
    by_step = torch.argsort(data.shard.steps * len(data) + data.shard.prompt_ids)
    positions = torch.linspace(0, len(data) - 1, min(count, len(data))).round().long()
    return by_step[positions]


@torch.no_grad()
def layer_sqnr(student: Student, data: SerialData, rows: torch.Tensor, layers: list[str]) -> float:
    """Signal to quantization noise of the model's outputs in dB, with only `layers` quantized.

    A tensor that several layers share is quantized for all its readers.
    """
    with student.only(layers):
        found = outputs_on(student.denoiser, data, rows)
    wanted = ModelOutputs(data.shard.conditional[rows], _rows(data.shard.unconditional, rows))
    noise = sum(float((a.cpu() - b).square().sum()) for a, b in _pairs(found, wanted))
    signal = sum(float(b.square().sum()) for _, b in _pairs(found, wanted))
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))


def _rows(tensor: Rows | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _pairs(found: ModelOutputs, wanted: ModelOutputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
