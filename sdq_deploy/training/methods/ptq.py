"""Method ptq: quantization without training, by the algorithm that the recipe names (docs/methods.md).

An algorithm may try several settings; each is judged as our own training judges its states, by the student's sampling
of the held-out prompts, and the best one stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from sdq_deploy.recipes.schema import PtqAlgorithm
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData, load_split
from sdq_deploy.training.methods.modelopt_scales import modelopt_scales, percentile_scales
from sdq_deploy.training.result import write_result
from sdq_deploy.training.student import Student
from sdq_deploy.training.trajectory import trajectory_snr
from sdq_export.stepping import StepDenoiser

__all__ = ["Candidate", "ptq"]


@dataclass(frozen=True)
class Candidate:
    """One setting of an algorithm.

    Attributes:
        settings: what it tried, for the record.
        unet: floating point, computing what the source's does; its weights are the ones to round.
        scales: of every site, under their checkpoint keys.
    """

    settings: dict[str, float]
    unet: nn.Module
    scales: Mapping[str, Tensor]


def ptq(context: TrainingContext, _: str = "") -> dict[str, Any]:
    """Stage fit without a fit: the best candidate as the run's result.

    Returns:
        Every candidate's held-out trajectory SNR in dB.
    """
    data, held_out = (load_split(context.folder.dataset, name) for name in ("training", "validation"))
    algorithm = context.recipe.ptq.algorithm
    tried: list[dict[str, float]] = []
    with context.bar("fit", _count(context)) as advance:
        for candidate in _ALGORITHMS[algorithm](context, data):
            student = Student(candidate.unet, context.timesteps, context.spec, candidate.scales)
            student.denoiser.to(context.device)
            snr = trajectory_snr(context, student.denoiser, held_out)
            if all(snr > other["trajectory_snr_db"] for other in tried):
                result = {"start_db": snr, "best_db": snr, "best_step": 0}
                write_result(context.folder.fit, student.tensors(), result)
            tried.append({**candidate.settings, "trajectory_snr_db": snr})
            advance()
    return {"algorithm": algorithm, "candidates": tried}


def _count(context: TrainingContext) -> int:
    settings = context.recipe.ptq
    return {"percentile": len(settings.percentiles), "smoothquant": len(settings.alphas)}.get(settings.algorithm, 1)


def _search(context: TrainingContext, _: SerialData) -> Iterator[Candidate]:
    """Where our own training starts from: searched weights, per-step scales."""
    yield Candidate({}, context.source.unet, load_file(context.folder.scales))


def _max(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    scales = modelopt_scales(_copy(context), context.spec, data, "max", context.recipe.calibrate.samples_per_step)
    yield Candidate({}, context.source.unet, scales)


def _mse(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    scales = modelopt_scales(_copy(context), context.spec, data, "mse", context.recipe.calibrate.samples_per_step)
    yield Candidate({}, context.source.unet, scales)


def _percentile(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    samples = context.recipe.calibrate.samples_per_step
    found = percentile_scales(_copy(context), context.spec, data, context.recipe.ptq.percentiles, samples)
    for percentile, scales in found:
        yield Candidate({"percentile": percentile}, context.source.unet, scales)


def _copy(context: TrainingContext) -> StepDenoiser:
    return StepDenoiser(copy.deepcopy(context.source.unet), context.timesteps).to(context.device).eval()


_ALGORITHMS: dict[PtqAlgorithm, Callable[[TrainingContext, SerialData], Iterator[Candidate]]] = {
    "search": _search,
    "max": _max,
    "mse": _mse,
    "percentile": _percentile,
}
