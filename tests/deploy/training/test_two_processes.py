"""A training by two processes that compute together: the dataset of one process, and the fit of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdq_deploy.training.log import read_log
from tests.deploy.training.helpers import run_workers


@pytest.fixture(scope="module")
def run_of_two(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's settings, from nothing to the checkpoint."""
    out = tmp_path_factory.mktemp("two") / "run"
    run_workers(tiny_sd, out, world=2)
    return out


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "fit" / "result.json").read_text(encoding="utf-8"))
    return found


def test_two_processes_make_the_set_of_one(finished_run: Path, run_of_two: Path) -> None:
    names = sorted(path.name for path in (finished_run / "dataset").glob("*.safetensors"))
    assert names == sorted(path.name for path in (run_of_two / "dataset").glob("*.safetensors"))
    assert len(names) == 6
    for name in names:
        one, two = load_file(finished_run / "dataset" / name), load_file(run_of_two / "dataset" / name)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)


def test_two_processes_train_what_one_trains(finished_run: Path, run_of_two: Path) -> None:
    one, two = read_log(finished_run / "log"), read_log(run_of_two / "log")
    # The first losses agree to rounding; later ones differ as rounding decisions of the grids do.
    assert two[1]["loss_output"] == pytest.approx(one[1]["loss_output"], rel=1e-4)
    assert two[1]["loss_ild"] == pytest.approx(one[1]["loss_ild"], rel=1e-4)
    assert two[1]["gradient_norm"] == pytest.approx(one[1]["gradient_norm"], rel=1e-3)
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.05)
    assert result(run_of_two)["start_db"] == pytest.approx(result(finished_run)["start_db"], abs=0.5)
