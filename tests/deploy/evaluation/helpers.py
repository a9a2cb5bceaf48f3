"""Run the command and read what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdq_deploy.cli import main
from sdq_deploy.evaluation.results import EvaluationResults


def run_evaluate(*arguments: object) -> int:
    """The exit code of `sdq-deploy evaluate`."""
    with pytest.raises(SystemExit) as exit_:
        main.run(["evaluate", *(str(argument) for argument in arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def results_in(out: Path) -> EvaluationResults:
    """results.json."""
    return EvaluationResults.model_validate_json((out / "results.json").read_text(encoding="utf-8"))


def write_prompts(folder: Path, count: int = 5) -> Path:
    """A prompt file."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(f"a red circle number {index}" for index in range(count)), encoding="utf-8")
    return path


def pngs(out: Path, name: str) -> dict[str, bytes]:
    """File name -> content of a candidate's images."""
    return {path.name: path.read_bytes() for path in sorted((out / "images" / name).glob("*.png"))}
