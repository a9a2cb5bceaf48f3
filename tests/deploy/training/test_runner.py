"""Stages are skipped when their inputs have not changed, and run again when they have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdq_deploy.demo.untrained import ALGORITHMS, quantize_without_training
from sdq_deploy.recipes import load_recipe
from sdq_deploy.recipes.schema import PtqAlgorithm
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.resolve import resolve_settings
from sdq_deploy.training.run import recorded_settings, run_training
from sdq_engines.errors import SdqError
from sdq_engines.files import claim_output
from sdq_engines.in_progress import IN_PROGRESS
from sdq_export.checkpoint import load_checkpoint
from sdq_export.reference import build_reference
from sdq_export.source import load_source
from tests.deploy.training.helpers import SMALL, small_settings, without_stages


def train_again(model: Path, finished: Path, out: Path, overrides: dict[str, Any] | None = None) -> list[str]:
    shutil.copytree(finished, out)
    return run_training(small_settings(model, out, overrides), resume=True, cpu=True, quiet=True)


def test_nothing_runs_twice(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    assert train_again(tiny_sd, finished_run, tmp_path / "run") == []


def test_only_what_depends_on_a_change_runs_again(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    assert train_again(tiny_sd, finished_run, tmp_path / "run", {"fit.max_train_steps": 1}) == ["fit", "save"]


def test_a_resumed_run_takes_the_table_of_its_new_precision(tiny_sd: Path, tmp_path: Path) -> None:
    """W4A8 recorded, W8A8 asked for: [w8a8.fit] counts; what was set by hand and recorded stays."""
    out, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle number {index}" for index in range(10)), encoding="utf-8")
    small = {key: value for key, value in SMALL.items() if key != "fit.max_train_steps"}
    first = resolve_settings(str(tiny_sd), out, recipe="shapes-64", overrides=small, prompt_file=prompts)
    assert (first.recipe.quantization.precision, first.recipe.fit.max_train_steps) == ("w4a8", 380)
    RunFolder(out).write_status({**RunFolder(out).read_status(), "settings": recorded_settings(first)})
    changed = {"quantization.precision": "w8a8"}
    resumed = resolve_settings(str(tiny_sd), out, overrides=changed, resume=True).recipe
    assert resumed == load_recipe("shapes-64", small | changed)
    assert resumed.fit.max_train_steps == 120


def test_another_run_gives_its_dataset(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = small_settings(tiny_sd, out, {"quantization.precision": "w8a8", "fit.max_train_steps": 0})
    run_training(settings, cpu=True, quiet=True, dataset=finished_run)
    for path in (finished_run / "dataset").glob("*-*.safetensors"):
        assert (out / "dataset" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
    assert load_checkpoint(out).spec.precision == "w8a8"


def test_a_dataset_of_no_run_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(SdqError, match="is not a training run"):
        run_training(small_settings(tiny_sd, tmp_path / "run"), cpu=True, quiet=True, dataset=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_what_could_not_be_exported_is_not_trained(tiny_sd: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    config = model / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": 0.1}))
    with pytest.raises(SdqError, match="The VAE's shift_factor is not supported"):
        run_training(small_settings(model, tmp_path / "run"), cpu=True, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_training_needs_resume(tiny_sd: Path, finished_run: Path) -> None:
    with pytest.raises(SdqError, match="already holds a training") as caught:
        run_training(small_settings(tiny_sd, finished_run), cpu=True, quiet=True)
    assert "--resume" in caught.value.hint


def test_a_training_that_was_killed_is_named_by_the_next_call(
    tiny_sd: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its stage and the memory that it used, which its own process writes down while it works."""
    out = without_stages(finished_run, tmp_path / "run", "save")
    found: dict[str, Any] = {}

    def watched(self: RunFolder, status: dict[str, Any]) -> None:
        found[status["status"]] = (out / IN_PROGRESS).read_text("utf-8")
        original(self, status)

    original = RunFolder.write_status
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_status", watched)
        run_training(small_settings(tiny_sd, out), resume=True, cpu=True, quiet=True)
    assert not (out / IN_PROGRESS).exists()
    assert json.loads(found["save"])["stage"] == "save"
    assert json.loads(found["save"])["memory_bytes"] > 0

    shutil.rmtree(out)
    without_stages(finished_run, out, "save")
    (out / IN_PROGRESS).write_text(found["save"], "utf-8")  # what a kill would have left
    said = f"The last training to {out} was killed in the stage 'save', probably for want of memory"
    with pytest.raises(SdqError, match=re.escape(said)):
        run_training(small_settings(tiny_sd, out), cpu=True, quiet=True)
    assert run_training(small_settings(tiny_sd, out), resume=True, cpu=True) == ["save"]
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (out / IN_PROGRESS).exists()


def test_a_training_that_was_killed_before_it_wrote_anything_can_begin_again(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / IN_PROGRESS).write_text('{"command": "training", "stage": "prepare", "memory_bytes": 5}', "utf-8")
    assert claim_output(tmp_path, "run") == tmp_path


def test_a_run_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for content in ("{", "[]", "{}"):
        folder.status_file.write_text(content, "utf-8")
        with pytest.raises(SdqError, match=r"run\.json (cannot be read|is not what a training writes)"):
            folder.read_status()


def test_a_folder_that_is_not_ours_is_left_alone(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("final", encoding="utf-8")
    with pytest.raises(SdqError, match="was not made by sdq-deploy"):
        run_training(small_settings(tiny_sd, tmp_path), cpu=True, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("stage", ["collect", "precompute", "calibrate", "sensitivity", "fit", "save"])
def test_an_interrupt_names_the_command_that_continues(
    tiny_sd: Path, finished_run: Path, tmp_path: Path, stage: str
) -> None:
    """Ctrl-C in each stage: raised by the stage's own progress bar, as a signal would."""
    out = without_stages(finished_run, tmp_path / "run", stage)
    from sdq_deploy.training.context import TrainingContext

    original = TrainingContext.bar

    def interrupted(self: TrainingContext, description: str, total: int, done: int = 0) -> Any:
        if description == stage:
            raise KeyboardInterrupt
        return original(self, description, total, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingContext, "bar", interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run_training(small_settings(tiny_sd, out), resume=True, cpu=True, quiet=True)
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == stage
    with pytest.raises(SdqError):
        load_checkpoint(out)
    assert stage in run_training(small_settings(tiny_sd, out), resume=True, cpu=True, quiet=True)
    assert load_checkpoint(out).spec.precision == "w4a8"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_untrained_checkpoints_have_the_same_sites(tiny_sd: Path, finished_run: Path, algorithm: PtqAlgorithm) -> None:
    source = load_source(tiny_sd)
    (untrained, tensors), trained = (
        quantize_without_training(finished_run, algorithm, source),
        load_checkpoint(finished_run),
    )
    assert untrained.spec.weights == trained.spec.weights
    assert [(site.name, site.consumers) for site in untrained.spec.activations] == [
        (site.name, site.consumers) for site in trained.spec.activations
    ]
    from tests.deploy.training.helpers import small_context

    context = small_context(tiny_sd, finished_run)
    from sdq_deploy.training.dataset import load_split
    from sdq_deploy.training.trajectory import trajectory_snr

    reference = build_reference(source.own(source.family.denoiser), untrained.spec, tensors, context.timesteps)
    snr = trajectory_snr(context, reference, load_split(finished_run / "dataset", "validation"))
    assert snr > 10
