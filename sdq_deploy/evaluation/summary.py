"""From scores to results: means with their intervals, Fréchet distances, paired differences, and notes on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdq_deploy.evaluation.candidates import Candidate
from sdq_deploy.evaluation.catalogue import FRECHET_METRICS, IMAGE_METRICS
from sdq_deploy.evaluation.metrics import PSNR_CAP
from sdq_deploy.evaluation.results import (
    CandidateResult,
    Comparison,
    EvaluationResults,
    Figure,
    PromptInfo,
    SamplerUsed,
    StepError,
)
from sdq_deploy.evaluation.scorers import Scorers
from sdq_deploy.evaluation.scoring import Scores
from sdq_deploy.evaluation.settings import EvaluationSettings
from sdq_deploy.evaluation.statistics import CONFIDENCE, Interval, frechet_distance, frechet_interval, mean_interval
from sdq_export.provenance import tool_versions

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Measured", "summarize"]

_TOOLS = ("sdq-deploy", "torch", "diffusers", "torchmetrics", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")


@dataclass
class Measured:
    """What is known of each candidate, by name; the reference's under its own.

    Attributes:
        scores: of every image.
        errors: relative latent errors [traced, T]; the reference has none.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    errors: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def summarize(
    settings: EvaluationSettings, measured: Measured, scorers: Scorers, progress: Progress
) -> EvaluationResults:
    """Everything in results.json but the time that it took."""
    prompts, sampler = settings.prompts, settings.sampler
    return EvaluationResults(
        prompts=PromptInfo(
            title=prompts.title, count=len(prompts), sha256=prompts.sha256, traced=min(settings.traced, len(prompts))
        ),
        sampler=SamplerUsed(
            scheduler=sampler.scheduler,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
        ),
        reference=_result(settings, settings.reference, measured, scorers, progress),
        candidates=[_result(settings, candidate, measured, scorers, progress) for candidate in settings.candidates],
        comparisons=_comparisons(settings, measured),
        skipped=scorers.skipped,
        notes=_notes(settings, scorers),
        confidence=CONFIDENCE,
        seconds=0.0,
        tools=tool_versions(_TOOLS),
    )


def _result(
    settings: EvaluationSettings, candidate: Candidate, measured: Measured, scorers: Scorers, progress: Progress
) -> CandidateResult:
    scores = measured.scores[candidate.name]
    figures = {name: _figure(name, values) for name, values in scores.values.items()}
    is_reference = candidate is settings.reference
    for space in scorers.spaces:
        if not is_reference:
            figures[space.name] = _frechet(settings, candidate, measured, space.name, progress)
        if space.name in scorers.real:
            distance = frechet_distance(scores.moments[space.name], scorers.real[space.name])
            figures[f"{space.name}_real"] = Figure(value=distance)
    order = [name for name in (*IMAGE_METRICS, *FRECHET_METRICS) if name in figures]
    psnr = scores.values.get("psnr")
    return CandidateResult(
        name=candidate.name,
        kind=candidate.kind,
        path=candidate.path,
        images_by=candidate.images_by,
        precision=candidate.precision,
        num_bytes=candidate.num_bytes,
        identity=candidate.identity,
        figures={name: figures[name] for name in order},
        identical=None if psnr is None else float((psnr >= PSNR_CAP).mean()),
        latent_errors=[] if is_reference else _step_errors(measured.errors[candidate.name]),
    )


def _figure(name: str, values: NDArray[np.float64]) -> Figure:
    interval = mean_interval(values)
    metric = IMAGE_METRICS[name]
    if metric.percent:
        return Figure(value=interval.value, low=interval.low, high=interval.high)
    worst = values.min() if metric.higher_is_better else values.max()
    return Figure(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        worst=float(worst),
        median=float(np.median(values)),
    )


def _frechet(
    settings: EvaluationSettings, candidate: Candidate, measured: Measured, space: str, progress: Progress
) -> Figure:
    """With an interval where features were kept; otherwise it would take all features of all images in memory."""
    own, wanted = measured.scores[candidate.name], measured.scores[settings.reference.name]
    if space not in own.features:
        return Figure(value=frechet_distance(own.moments[space], wanted.moments[space]))
    task = progress.add_task(f"{FRECHET_METRICS[space].title}, {candidate.name}", total=None)
    found = frechet_interval(own.features[space], wanted.features[space], on_resample=lambda: progress.advance(task))
    progress.update(task, total=progress.tasks[task].completed)
    return Figure(value=found.value, low=found.low, high=found.high)


def _step_errors(errors: NDArray[np.float64]) -> list[StepError]:
    if len(errors) == 0:
        return []
    intervals: list[Interval] = [mean_interval(errors[:, step]) for step in range(errors.shape[1])]
    return [
        StepError(step=step, value=found.value, low=found.low, high=found.high) for step, found in enumerate(intervals)
    ]


def _comparisons(settings: EvaluationSettings, measured: Measured) -> list[Comparison]:
    """Every candidate against the reference where both have the figure, and every two candidates."""
    names = [candidate.name for candidate in settings.candidates]
    pairs = [(name, settings.reference.name) for name in names]
    pairs += [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]
    found = []
    for first, second in pairs:
        a, b = measured.scores[first].values, measured.scores[second].values
        for figure in IMAGE_METRICS:
            if figure in a and figure in b:
                interval = mean_interval(a[figure] - b[figure])
                found.append(
                    Comparison(
                        figure=figure,
                        first=first,
                        second=second,
                        value=interval.value,
                        low=interval.low,
                        high=interval.high,
                    )
                )
    return found


def _notes(settings: EvaluationSettings, scorers: Scorers) -> list[str]:
    notes = []
    count = len(settings.prompts)
    for space in scorers.spaces:
        if count < space.dimensions:
            notes.append(
                f"{FRECHET_METRICS[space.name].title} is biased upwards with fewer images ({count}) than features "
                f"({space.dimensions}): compare it only at the same number of images, best 2,048 or more."
            )
        if not space.kept:
            notes.append(f"{FRECHET_METRICS[space.name].title} has no interval: its features are not kept in memory.")
    if scorers.real:
        notes.append("Fréchet distances to real images have no interval: real images are not paired with prompts.")
    others = [
        candidate.name
        for candidate in settings.candidates
        if candidate.source.sha256 != settings.reference.source.sha256
    ]
    if others:
        notes.append(
            f"{', '.join(others)}: made from another model than the reference, so the figures hold both differences."
        )
    return notes
