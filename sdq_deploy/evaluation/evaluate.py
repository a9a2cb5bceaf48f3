"""One evaluation from candidates to results: make what images are missing, score them, sum up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdq_deploy.evaluation.candidates import Candidate
from sdq_deploy.evaluation.generation import Generation, ImageWorkers
from sdq_deploy.evaluation.results import EvaluationResults
from sdq_deploy.evaluation.scorers import Scorers, choose_scorers
from sdq_deploy.evaluation.scoring import Scores, score
from sdq_deploy.evaluation.settings import EvaluationSettings
from sdq_deploy.evaluation.store import Shard, shards_of
from sdq_deploy.evaluation.summary import Measured, summarize

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["run_evaluation", "scorers_of"]


def scorers_of(settings: EvaluationSettings) -> Scorers:
    """Load the metrics; those that cannot be taken are named.

    Raises:
        SdqError: weights that were given do not load, or the real images cannot be read.
    """
    return choose_scorers(
        settings.prompts,
        settings.reference.image_size,
        real=settings.real,
        lpips=settings.lpips,
        inception=settings.inception,
        clip=settings.clip,
        device=settings.device,
    )


def run_evaluation(
    settings: EvaluationSettings, scorers: Scorers, progress: Progress
) -> tuple[EvaluationResults, dict[str, Scores]]:
    """Make images, score them and sum up.

    Args:
        settings: what to do.
        scorers: of `scorers_of`.
        progress: a started display.

    Returns:
        The results, and each candidate's scores, image by image, by its name.

    Raises:
        SdqError: a candidate does not load or run.
    """
    started = time.perf_counter()
    prompts, everyone = settings.prompts, (settings.reference, *settings.candidates)
    shards = shards_of(prompts.prompts, prompts.seeds, settings.batch_size, settings.traced)
    with ImageWorkers(settings.processes) as workers:
        for candidate in everyone:
            _make(settings, workers, candidate, shards, progress)
    measured = Measured()
    for candidate in everyone:
        measured.scores[candidate.name] = _score(settings, candidate, scorers, progress)
        if candidate is not settings.reference:
            measured.errors[candidate.name] = settings.store(candidate).read_errors(shards)
    results = summarize(settings, measured, scorers, progress)
    seconds = round(time.perf_counter() - started, 1)
    return results.model_copy(update={"seconds": seconds}), measured.scores


def _make(
    settings: EvaluationSettings,
    workers: ImageWorkers,
    candidate: Candidate,
    shards: Sequence[Shard],
    progress: Progress,
) -> None:
    reference = None if candidate is settings.reference else settings.reference
    generation = Generation(settings.images, candidate, reference, settings.sampler, settings.device)
    task = progress.add_task(f"images, {candidate.name}", total=len(settings.prompts))
    workers.make(generation, shards, lambda count: progress.advance(task, count))


def _score(settings: EvaluationSettings, candidate: Candidate, scorers: Scorers, progress: Progress) -> Scores:
    task = progress.add_task(f"metrics, {candidate.name}", total=len(settings.prompts))
    return score(
        settings.store(candidate),
        settings.store(settings.reference),
        len(settings.prompts),
        scorers.own if candidate is settings.reference else [*scorers.against, *scorers.own],
        scorers.spaces,
        settings.batch_size,
        lambda count: progress.advance(task, count),
    )
