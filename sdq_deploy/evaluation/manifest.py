"""Write what an evaluation found into a package's manifest, so that it carries its own proof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdq_deploy.evaluation.candidates import Candidate
from sdq_deploy.evaluation.results import CandidateResult, EvaluationResults
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.store import open_package

__all__ = ["write_manifests"]


def write_manifests(candidates: Sequence[Candidate], results: EvaluationResults) -> list[str]:
    """Put the figures of each package under `fidelity.evaluation` of its manifest; return the packages' folders."""
    written = []
    for candidate, found in zip(candidates, results.candidates, strict=True):
        if candidate.kind == "package":
            _write(open_package(candidate.path, verify="cached").folder, candidate, found, results)
            written.append(candidate.path)
    return written


def _write(folder: Path, candidate: Candidate, found: CandidateResult, results: EvaluationResults) -> None:
    entry = {
        "engine": candidate.engine,
        "reference": {"model": results.reference.path, "identity": results.reference.identity},
        "prompts": results.prompts.model_dump(),
        "sampler": results.sampler.model_dump(),
        "figures": {name: figure.model_dump() for name, figure in found.figures.items()},
        "latent_errors": [error.value for error in found.latent_errors],
    }
    with PackageEditor.edit(folder, "evaluation") as editor:
        fidelity = {**editor.current.fidelity, "evaluation": entry}
        editor.commit(editor.current.model_copy(update={"fidelity": fidelity}))
