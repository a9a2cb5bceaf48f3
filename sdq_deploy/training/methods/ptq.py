"""Method ptq: quantization without training, by the algorithm that the recipe names (docs/methods.md).

An algorithm may try several settings; each is judged as our own training judges its states, by the student's sampling
of the held-out prompts, and the best one stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdq_deploy.recipes.schema import PtqAlgorithm, Recipe
from sdq_deploy.training.calibrate import activation_scales, largest_activations, weight_scales
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData, load_split
from sdq_deploy.training.method import Stage, TrainingMethod
from sdq_deploy.training.methods.activation_statistics import ChannelStatistics, channel_statistics
from sdq_deploy.training.methods.awq import awq_factors, clipped_scale
from sdq_deploy.training.methods.checks import check_ptq
from sdq_deploy.training.methods.modelopt_scales import modelopt_scales, percentile_scales
from sdq_deploy.training.methods.smoothing import find_fold_points, fold_factors, smoothquant_factors
from sdq_deploy.training.result import write_result
from sdq_deploy.training.stages import DATA
from sdq_deploy.training.student import Student
from sdq_deploy.training.trajectory import trajectory_snr
from sdq_export.checkpoint import weight_scale_key
from sdq_export.stepping import StepDenoiser

__all__ = ["METHOD", "Candidate", "candidates", "ptq"]


@dataclass(frozen=True)
class Candidate:
    """One setting of an algorithm.

    Attributes:
        settings: what it tried, for the record.
        denoiser: floating point, computing what the source's does; its weights are the ones to round.
        scales: of every site, under their checkpoint keys.
    """

    settings: dict[str, float]
    denoiser: nn.Module
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
        for candidate in candidates(context, data):
            student = Student(candidate.denoiser, context.timesteps, context.spec, candidate.scales)
            student.denoiser.to(context.device)
            snr = trajectory_snr(context, student.denoiser, held_out)
            if all(snr > other["trajectory_snr_db"] for other in tried):
                result = {"start_db": snr, "best_db": snr, "best_step": 0}
                write_result(context.folder.fit, student.tensors(), result)
            tried.append({**candidate.settings, "trajectory_snr_db": snr})
            advance()
    return {"algorithm": algorithm, "candidates": tried}


def candidates(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    """What the recipe's algorithm tries, on the training's part of the serial dataset."""
    return _ALGORITHMS[context.recipe.ptq.algorithm](context, data)


def _count(context: TrainingContext) -> int:
    settings = context.recipe.ptq
    return {"percentile": len(settings.percentiles), "smoothquant": len(settings.alphas)}.get(settings.algorithm, 1)


def _search(context: TrainingContext, _: SerialData) -> Iterator[Candidate]:
    """Where our own training starts from: searched weights, per-step scales."""
    yield Candidate({}, context.source.denoiser, load_file(context.folder.scales))


def _max(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    scales = modelopt_scales(_copy(context), context.spec, data, "max", context.recipe.calibrate.samples_per_step)
    yield Candidate({}, context.source.denoiser, scales)


def _mse(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    scales = modelopt_scales(_copy(context), context.spec, data, "mse", context.recipe.calibrate.samples_per_step)
    yield Candidate({}, context.source.denoiser, scales)


def _percentile(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    samples = context.recipe.calibrate.samples_per_step
    found = percentile_scales(_copy(context), context.spec, data, context.recipe.ptq.percentiles, samples)
    for percentile, scales in found:
        yield Candidate({"percentile": percentile}, context.source.denoiser, scales)


def _smoothquant(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    """Factors on the input channels, folded; then searched weights and the activations' largest magnitudes."""
    unet, spec, settings = context.source.denoiser, context.spec, context.recipe.calibrate
    points = find_fold_points(unet, spec)
    points = [point for point in points if set(point.readers) <= set(spec.activation_of)]
    seen = _inputs_of(context, [point.readers[0] for point in points], data)
    largest = {point: seen[point.readers[0]].largest.cpu() for point in points}
    for alpha in context.recipe.ptq.alphas:
        folded = fold_factors(unet, smoothquant_factors(unet, points, largest, alpha))
        scales = weight_scales(folded, spec, settings, context.device, _nothing)
        denoiser = StepDenoiser(copy.deepcopy(folded), context.timesteps).to(context.device).eval()
        tops = largest_activations(denoiser, spec, data, settings.samples_per_step, _nothing)
        yield Candidate({"alpha": alpha}, folded, scales | activation_scales(tops, spec))


def _awq(context: TrainingContext, data: SerialData) -> Iterator[Candidate]:
    """Factors and clipping for the weights whose inputs are not quantized; the others as our own search has them."""
    unet, spec = context.source.denoiser, context.spec
    alone = {layer: site for layer, site in spec.weight_sites.items() if layer not in spec.activation_of}
    points = [point for point in find_fold_points(unet, spec) if set(point.readers) <= set(alone)]
    seen = _inputs_of(context, list(alone), data, gram=True)
    tries = context.recipe.ptq.awq_points
    factors = {point: awq_factors(unet, point, alone, seen[point.readers[0]], tries) for point in points}
    folded = fold_factors(unet, factors)
    divided = {reader: factor for point, factor in factors.items() for reader in point.readers}
    scales = load_file(context.folder.scales)
    for layer, site in alone.items():
        gram = seen[layer].gram
        assert gram is not None
        if layer in divided:
            gram = gram / torch.outer(divided[layer], divided[layer])
        weight = folded.get_parameter(f"{layer}.weight").detach().float().to(gram.device)
        scales[weight_scale_key(layer)] = clipped_scale(weight, site, gram).cpu()
    yield Candidate({}, folded, scales)


def _inputs_of(
    context: TrainingContext, layers: Sequence[str], data: SerialData, *, gram: bool = False
) -> dict[str, ChannelStatistics]:
    return channel_statistics(context.teacher, layers, data, context.recipe.calibrate.samples_per_step, gram=gram)


def _nothing() -> None:
    """The bar advances by candidates."""


def _copy(context: TrainingContext) -> StepDenoiser:
    return StepDenoiser(copy.deepcopy(context.source.denoiser), context.timesteps).to(context.device).eval()


_ALGORITHMS: dict[PtqAlgorithm, Callable[[TrainingContext, SerialData], Iterator[Candidate]]] = {
    "search": _search,
    "max": _max,
    "mse": _mse,
    "percentile": _percentile,
    "smoothquant": _smoothquant,
    "awq": _awq,
}


def _inputs(context: TrainingContext) -> Any:
    return [context.recipe.method, context.recipe.ptq.model_dump(mode="json")]


def _is_ours(recipe: Recipe) -> bool:
    """Where our own training starts from; the published peers know one scale for all steps, and other smoothing."""
    return recipe.ptq.algorithm == "search"


METHOD = TrainingMethod(
    name="ptq",
    fit=Stage("fit", ptq, _inputs, DATA),
    groups=lambda recipe: recipe.quantization.groups if _is_ours(recipe) else 1,
    smooths=_is_ours,
    check=check_ptq,
)
