"""One finished small training that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.training.helpers import train


@pytest.fixture(scope="session")
def finished_run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, complete, made in this process. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_sd, out)
    return out
