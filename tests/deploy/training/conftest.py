"""One finished small training that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.training.helpers import run_workers


@pytest.fixture(scope="session")
def finished_run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, complete, made by one process. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_workers(tiny_sd, out)
    return out
