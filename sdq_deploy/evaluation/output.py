"""The output folder of an evaluation: what is in it beside the images.

evaluation.json   marks the folder as ours
results.json      see `sdq_deploy.evaluation.results`
per-image.csv     one row an image and candidate: candidate, number, seed, every metric with one value an image, prompt
report.html       needs nothing beside it
images/           see `sdq_deploy.evaluation.store`
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sdq_deploy.evaluation.catalogue import IMAGE_METRICS
from sdq_deploy.evaluation.prompts import PromptSet
from sdq_deploy.evaluation.report import write_page
from sdq_deploy.evaluation.results import EvaluationResults
from sdq_deploy.evaluation.scoring import Scores
from sdq_deploy.evaluation.settings import EvaluationSettings
from sdq_engines.files import atomic_write_json, atomic_write_text, claimed_folder

__all__ = ["claimed", "write_results"]


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Make the output folder ours for a block.

    Raises:
        SdqError: it holds something else, cannot be written, or another evaluation is writing to it.
    """
    with claimed_folder(out, "evaluation", "evaluation") as folder:
        atomic_write_json(folder / "evaluation.json", {"kind": "sdq-evaluation"})
        yield folder


def write_results(settings: EvaluationSettings, results: EvaluationResults, scores: Mapping[str, Scores]) -> Path:
    """Write everything but the images; return the page's path."""
    atomic_write_text(settings.out / "per-image.csv", _per_image(settings.prompts, scores))
    atomic_write_text(settings.out / "results.json", results.model_dump_json(indent=2) + "\n")
    return write_page(settings, results, scores)


def _per_image(prompts: PromptSet, scores: Mapping[str, Scores]) -> str:
    metrics = [name for name in IMAGE_METRICS if any(name in found.values for found in scores.values())]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["candidate", "number", "seed", *metrics, "prompt"])
    for name, found in scores.items():
        columns = [found.values.get(metric) for metric in metrics]
        for number, (prompt, seed) in enumerate(zip(prompts.prompts, prompts.seeds, strict=True)):
            values = ["" if column is None else f"{column[number]:.6g}" for column in columns]
            writer.writerow([name, number, seed, *values, prompt])
    return text.getvalue()
