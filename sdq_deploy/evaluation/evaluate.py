"""One evaluation from candidates to results: make what images are missing, score them, sum up."""

from __future__ import annotations

import os
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
from sdq_deploy.processes import LONGEST_WAIT
from sdq_deploy.sharing import await_files
from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.progress import Progress

__all__ = ["join_processes", "run_evaluation", "scorers_of"]


def join_processes(settings: EvaluationSettings) -> PartialState:
    """This process's place among those that `accelerate launch` started; alone, the first of one.

    Raises:
        SdqError: several were launched, and each is to start several more.
    """
    from accelerate import PartialState

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and settings.processes > 1:
        raise SdqError(
            f"accelerate launched {launched} processes, and --processes asks each for {settings.processes} more.",
            "Leave --processes out; accelerate launch --num_processes says how many make images.",
        )
    return PartialState(cpu=settings.device == "cpu", timeout=LONGEST_WAIT)


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
    settings: EvaluationSettings, scorers: Scorers, progress: Progress, state: PartialState
) -> tuple[EvaluationResults, dict[str, Scores]] | None:
    """Make images, score them and sum up.

    Args:
        settings: what to do.
        scorers: of `scorers_of`.
        progress: a started display.
        state: of `join_processes`; each process makes its part of every candidate's images.

    Returns:
        The results, and each candidate's scores, image by image, by its name; None in all processes but the first,
        which alone scores.

    Raises:
        SdqError: a candidate does not load or run; another process's images cannot be seen from the first.
    """
    started = time.perf_counter()
    everyone = (settings.reference, *settings.candidates)  # the others' latents are compared with the reference's
    shards = shards_of(settings.prompts.prompts, settings.prompts.seeds, settings.batch_size, settings.traced)
    # in turns: what a longer evaluation adds to a shorter one is at the end
    mine = shards[state.process_index :: state.num_processes]
    with ImageWorkers(settings.processes) as workers:
        for candidate in everyone:
            _make(settings, workers, candidate, mine, progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if state.num_processes > 1:
        stores = [settings.store(candidate) for candidate in everyone]
        await_files([path for store in stores for shard in shards for path in store.paths(shard)])
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
    task = progress.add_task(f"images, {candidate.name}", total=sum(len(shard.prompts) for shard in shards))
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
