"""The fit: better or equal, and continued after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdq_deploy.training.fit import learning_rate_factor
from sdq_deploy.training.log import read_log
from sdq_export.checkpoint import load_checkpoint
from tests.deploy.training.helpers import start_worker, train, without_stages


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "fit" / "result.json").read_text(encoding="utf-8"))


def test_a_finished_run_holds_a_whole_checkpoint_a_log_and_the_curves(finished_run: Path) -> None:
    checkpoint = load_checkpoint(finished_run)
    assert checkpoint.info.notes["best_step"] == result(finished_run)["best_step"]
    records = read_log(finished_run / "log")
    assert [record["step"] for record in records] == list(range(7))
    assert {"loss", "loss_output", "loss_ild", "lr_weights", "oscillating", "frozen"} <= records[1].keys()
    assert list((finished_run / "log").glob("events.out.tfevents.*"))
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished_run / "run.json").read_text(encoding="utf-8"))["status"] == "complete"


def test_the_saved_state_is_the_best_that_was_measured(finished_run: Path) -> None:
    measured = {r["step"]: r["trajectory_snr_db"] for r in read_log(finished_run / "log") if "trajectory_snr_db" in r}
    assert sorted(measured) == [0, 3, 6]
    found = result(finished_run)
    assert found["best_db"] == max(measured.values()) == measured[found["best_step"]]
    assert found["best_db"] >= found["start_db"] == measured[0]


def test_training_that_harms_returns_the_initialization(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    out, untrained = (without_stages(finished_run, tmp_path / name, "fit") for name in ("run", "untrained"))
    train(tiny_sd, out, {"fit.weight_lr.w4": 0.5, "fit.max_train_steps": 3})
    assert result(out)["best_step"] == 0
    train(tiny_sd, untrained, {"fit.max_train_steps": 0})
    wanted, found = load_checkpoint(untrained).tensors, load_checkpoint(out).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("pipeline", ["parallel", "serial"])
def test_the_other_pipelines_train_too(tiny_sd: Path, finished_run: Path, tmp_path: Path, pipeline: str) -> None:
    out = without_stages(finished_run, tmp_path / "run", "fit")
    train(tiny_sd, out, {"fit.pipeline": pipeline})
    assert all(record["loss"] > 0 for record in read_log(out / "log")[1:])
    assert load_checkpoint(out).spec.precision == "w4a8"


def test_killed_in_fit_it_continues_and_ends_where_an_undisturbed_run_ends(
    tiny_sd: Path, finished_run: Path, tmp_path: Path
) -> None:
    out = without_stages(finished_run, tmp_path / "run", "fit")
    worker = start_worker(tiny_sd, out)
    while not (out / "fit" / "resume.pt").is_file():
        if worker.poll() is not None:
            pytest.fail(worker.communicate()[0])
    worker.kill()
    worker.communicate()
    saved = torch.load(out / "fit" / "resume.pt", weights_only=True)["step"]
    assert 0 < saved < 6
    before = {path: path.stat().st_mtime_ns for path in (out / "dataset").iterdir()}
    assert train(tiny_sd, out) == ["fit", "save"]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "dataset").iterdir()}
    wanted, found = read_log(finished_run / "log"), read_log(out / "log")
    assert [record["step"] for record in found] == list(range(7))
    assert [record["loss"] for record in found[1:]] == pytest.approx([r["loss"] for r in wanted[1:]], rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
