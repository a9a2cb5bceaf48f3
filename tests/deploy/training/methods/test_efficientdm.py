"""Method efficientdm from the command's side: it learns, saves no adapter, says what it held, and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdq_deploy.training.log import read_log
from sdq_export.checkpoint import load_checkpoint
from tests.deploy.training.helpers import start_worker, train, without_stages
from tests.deploy.training.methods.runs import run_method, snr_of, status_of

SETTINGS = {"method": "efficientdm", "efficientdm.rank": 4, "efficientdm.adapter_lr": 0.1}


@pytest.fixture(scope="module")
def tuned(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("efficientdm") / "run"
    train(tiny_sd, out, SETTINGS)
    return out


def test_it_ends_as_a_checkpoint_without_adapters(tiny_sd: Path, finished_run: Path, tuned: Path) -> None:
    checkpoint, ours = load_checkpoint(tuned), load_checkpoint(finished_run)
    assert checkpoint.info.notes["method"] == "efficientdm"
    unsmoothed = {name for name in ours.tensors if not name.endswith(".smoothing")}
    assert checkpoint.tensors.keys() == unsmoothed < ours.tensors.keys()
    assert checkpoint.spec == ours.spec
    best = checkpoint.info.notes["trajectory_snr_db"]["best"]
    assert snr_of(tiny_sd, tuned, checkpoint) == pytest.approx(best, abs=1e-3)


def test_what_is_not_quantized_stays_the_teachers(tiny_sd: Path, tuned: Path) -> None:
    from sdq_export.source import load_source

    checkpoint, weights = load_checkpoint(tuned), load_source(tiny_sd).denoiser.state_dict()
    kept = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype == torch.float32 and name in weights]
    assert len(kept) > 50
    assert all(torch.equal(checkpoint.tensors[name], weights[name]) for name in kept)


def test_it_starts_where_ours_starts_and_learns(tiny_sd: Path, finished_run: Path, tuned: Path, tmp_path: Path) -> None:
    """But for smoothing and the weighting of steps, which are ours."""
    plain = {"calibrate.smoothing": [], "fit.ild_weight": 0.0, "fit.step_weighting": 0.0}
    run_method(tiny_sd, finished_run, tmp_path / "ours", plain)
    mine, ours = read_log(tuned / "log"), read_log(tmp_path / "ours" / "log")
    assert mine[0]["trajectory_snr_db"] == pytest.approx(ours[0]["trajectory_snr_db"], abs=1e-6)
    assert mine[1]["loss_output"] == pytest.approx(ours[1]["loss_output"], rel=1e-6)
    assert mine[2]["loss_output"] != pytest.approx(ours[2]["loss_output"], rel=1e-6)
    assert "loss_ild" not in mine[1]
    rates = [record["lr_scales"] for record in mine[1:]]
    assert rates == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])


def test_the_memory_is_reported_beside_full_training(finished_run: Path, tuned: Path) -> None:
    mine, ours = (status_of(run)["stages"]["fit"]["measured"] for run in (tuned, finished_run))
    assert mine["full_training_state_bytes"] == ours["full_training_state_bytes"] == ours["trainable_state_bytes"]
    assert mine["trainable_state_bytes"] < ours["trainable_state_bytes"] / 4
    assert mine["peak_memory_bytes"] > mine["trainable_state_bytes"]
    assert read_log(tuned / "log")[0]["trainable_state_bytes"] == mine["trainable_state_bytes"]
    assert load_checkpoint(tuned).info.notes["measured"] == mine


def test_killed_it_continues_and_ends_where_an_undisturbed_one_ends(tiny_sd: Path, tuned: Path, tmp_path: Path) -> None:
    out = without_stages(tuned, tmp_path / "run", "fit")
    worker = start_worker(tiny_sd, out, SETTINGS)
    while not (out / "fit" / "resume.pt").is_file():
        if worker.poll() is not None:
            pytest.fail(worker.communicate()[0])
    worker.kill()
    worker.communicate()
    train(tiny_sd, out, SETTINGS)
    wanted, found = ([record["loss"] for record in read_log(run / "log")[1:]] for run in (tuned, out))
    assert found == pytest.approx(wanted, rel=1e-5)
