"""`--dry-run`: what it foresees is what the training then finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdq_deploy.training.forecast import forecast
from tests.deploy.training.helpers import small_context, small_settings


@pytest.fixture(scope="module")
def model(tiny_sd: Path) -> Path:
    return tiny_sd


def test_sites_and_disk_are_those_of_the_run(model: Path, finished_run: Path) -> None:
    found = forecast(small_settings(model, finished_run))
    spec = small_context(model, finished_run).spec
    assert sum(found.quantized_weights.values()) == len(spec.weights)
    assert found.activation_sites == len(spec.activations)
    assert found.kept == ("conv_in", "conv_out")
    shards = list((finished_run / "dataset").glob("*-*.safetensors"))
    assert sum(len(load_file(shard)["steps"]) for shard in shards) == found.latents
    written = sum(path.stat().st_size for path in (finished_run / "dataset").rglob("*.*"))
    assert found.dataset_bytes == pytest.approx(written, rel=0.2)  # headers weigh in so small a set


def test_trainable_state_is_what_the_fit_measured(model: Path, finished_run: Path) -> None:
    measured = json.loads((finished_run / "run.json").read_text(encoding="utf-8"))["stages"]["fit"]["measured"]
    found = forecast(small_settings(model, finished_run))
    # scales learn too; they are few
    assert found.trainable_bytes == pytest.approx(measured["trainable_state_bytes"], rel=0.05)


def test_checkpointing_trades_memory_for_operations(model: Path, tmp_path: Path) -> None:
    plain = forecast(small_settings(model, tmp_path))
    saving = forecast(small_settings(model, tmp_path, {"fit.gradient_checkpointing": True}))
    assert saving.activation_bytes < plain.activation_bytes
    assert saving.flops_per_step > plain.flops_per_step


def test_twice_the_batch_is_twice_the_work(model: Path, tmp_path: Path) -> None:
    once = forecast(small_settings(model, tmp_path, {"fit.batch_size": 4}))
    twice = forecast(small_settings(model, tmp_path, {"fit.batch_size": 8}))
    assert twice.flops_per_step == 2 * once.flops_per_step
    assert twice.activation_bytes == 2 * once.activation_bytes
    assert twice.trainable_bytes == once.trainable_bytes


def test_adapters_learn_less(model: Path, tmp_path: Path) -> None:
    ours = forecast(small_settings(model, tmp_path))
    adapters = forecast(small_settings(model, tmp_path, {"method": "efficientdm", "efficientdm.rank": 2}))
    assert adapters.trainable_bytes < ours.trainable_bytes / 3
    # the student's weights rest, and nothing asks the teacher: the dataset has its outputs
    assert adapters.teacher_bytes == 0 < ours.teacher_bytes
    assert adapters.frozen_bytes >= 4 * adapters.parameters


def test_nothing_is_written(model: Path, tmp_path: Path) -> None:
    settings = replace(small_settings(model, tmp_path / "run"), seed=3)
    assert forecast(settings).parameters > 0
    assert not (tmp_path / "run").exists()
