"""Stage prepare and what a run is known by: the model's hash, not its place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from sdq_deploy.cli import main
from sdq_deploy.evaluation.candidates import find_reference, open_candidates
from sdq_deploy.lora import Lora
from sdq_deploy.run_models import open_run_model
from sdq_deploy.training.context import TrainingSettings
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.forecast import forecast
from sdq_deploy.training.prepare import prepare_model
from sdq_deploy.training.resolve import resolve_settings
from sdq_deploy.training.run import make_accelerator, recorded_settings, run_training
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import load_checkpoint
from sdq_export.single_file import FromFile
from sdq_export.source import Source, load_source
from tests.deploy.training.helpers import SMALL, small_settings
from tests.single_files import original_state, write_file

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
#: A run of a second: nothing is fitted.
QUICK = {"method": "ptq", "ptq.algorithm": "max", "quantization.precision": "w8a8", "collect.num_prompts": 2}


def write_adapter(path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    up, down = (0.3 * torch.randn(*shape, generator=generator) for shape in ((32, 2), (2, 32)))
    save_file({f"{QUERY}.lora_up.weight": up, f"{QUERY}.lora_down.weight": down}, path)
    return path


def with_lora(model: Path, out: Path, adapter: Path, weight: float = 1.0) -> TrainingSettings:
    return dataclasses.replace(small_settings(model, out, QUICK), loras=(Lora(adapter, weight),))


def prepared(settings: TrainingSettings) -> tuple[Source, list[str]]:
    accelerator = make_accelerator(settings.recipe, cpu=True)
    return prepare_model(settings, accelerator, Progress(disable=True), recorded_settings(settings))


def files_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_model_is_made_once_and_anew_when_an_input_has_changed(tiny_sd: Path, tmp_path: Path) -> None:
    run, adapter = tmp_path / "run", write_adapter(tmp_path / "a.safetensors")
    (run / ".model.dead.tmp").mkdir(parents=True)  # of a process that was killed
    source, ran = prepared(with_lora(tiny_sd, run, adapter))
    assert (ran, source.folder) == (["prepare"], (run / "model").resolve())
    assert sorted(path.name for path in run.iterdir()) == ["model", "run.json"]
    assert "with adapters fused into its weights: a.safetensors (1)." in (run / "model/NOTICE").read_text("utf-8")
    assert RunFolder(run).read_status()["stages"]["prepare"]["done"]
    before = files_in(run)
    assert prepared(with_lora(tiny_sd, run, adapter))[1] == []
    assert files_in(run) == before
    stronger = source.sha256
    weaker, ran = prepared(with_lora(tiny_sd, run, adapter, 0.5))
    assert ran == ["prepare"]
    assert weaker.sha256 != stronger
    write_adapter(adapter, seed=1)
    assert prepared(with_lora(tiny_sd, run, adapter, 0.5))[1] == ["prepare"]


def test_a_failure_leaves_the_earlier_model(tiny_sd: Path, tmp_path: Path) -> None:
    run, adapter = tmp_path / "run", write_adapter(tmp_path / "a.safetensors")
    made = prepared(with_lora(tiny_sd, run, adapter))[0].sha256
    save_file({**load_file(adapter), f"{QUERY}.alpha": torch.tensor(float("nan"))}, adapter)
    with pytest.raises(SdqError, match="makes weights that are not finite"):
        prepared(with_lora(tiny_sd, run, adapter))
    assert sorted(path.name for path in run.iterdir()) == ["model", "run.json"]
    assert load_source(run / "model").sha256 == made
    with pytest.raises(SdqError, match="not finished: it stopped in the stage 'prepare'"):
        RunFolder(run).require_finished()


def test_a_users_own_folder_is_never_overwritten(tiny_sd: Path, tmp_path: Path) -> None:
    run, adapter = tmp_path / "run", write_adapter(tmp_path / "a.safetensors")
    (run / "model").mkdir(parents=True)
    (run / "model/mine.txt").write_text("mine")
    with pytest.raises(SdqError, match="was not made by sdq-deploy; nothing was written"):
        prepared(with_lora(tiny_sd, run, adapter))
    assert [path.name for path in run.rglob("*")] == ["model", "mine.txt"]


def test_a_run_goes_on_and_is_exported_after_everything_was_moved(tiny_sd: Path, tmp_path: Path) -> None:
    model, run = Path(shutil.copytree(tiny_sd, tmp_path / "model")), tmp_path / "run"
    adapter = write_adapter(tmp_path / "a.safetensors")
    ran = run_training(with_lora(model, run, adapter), cpu=True, quiet=True)
    assert ran[0] == "prepare"
    assert "collect" in ran
    adapter.unlink()
    model, run = model.rename(tmp_path / "elsewhere"), run.rename(tmp_path / "moved")
    assert run_training(resolve_settings(str(model), run, resume=True), resume=True, cpu=True, quiet=True) == [
        "save"  # which records where the model is now
    ]
    checkpoint = load_checkpoint(run)
    found = open_run_model(run, checkpoint.info.source)
    assert (found.folder, found.sha256) == ((run / "model").resolve(), checkpoint.info.source.sha256)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = other / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "scaling_factor": 0.2}), "utf-8")
    with pytest.raises(SdqError, match=f"trains {model}, not {other}"):
        resolve_settings(str(other), run, resume=True)


def test_a_runs_model_is_found_by_its_hash(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    trained_from = load_checkpoint(finished_run).info.source
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    assert open_run_model(run, trained_from).folder == tiny_sd.resolve()
    gone = trained_from.model_copy(update={"model": str(tmp_path / "gone")})
    with pytest.raises(SdqError, match=r"cannot be loaded from where it was.*gone does not exist") as caught:
        open_run_model(run, gone)
    assert "--model FOLDER" in caught.value.hint
    for part in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "vae/config.json"):
        copy = Path(shutil.copytree(tiny_sd, tmp_path / part.replace("/", "-")))
        assert open_run_model(run, trained_from, str(copy)).folder == copy.resolve()
        path = copy / part
        if path.suffix == ".json":
            path.write_bytes(path.read_bytes() + b"\n")
        else:
            weights = load_file(path)
            weights["final_layer_norm.bias"] += 1
            save_file(weights, path, {"format": "pt"})
        named = part.partition("/")[0]
        with pytest.raises(SdqError, match=f"was not trained from .* as it is: the hash of {named} is not the same"):
            open_run_model(run, trained_from, str(copy))


def test_a_forecast_writes_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "run", write_adapter(tmp_path / "a.safetensors")
    file = write_file(original_state("sd", tiny_sd), tmp_path / "model.safetensors")
    before = files_in(tmp_path)
    plain = forecast(small_settings(tiny_sd, out, QUICK))
    fused = forecast(with_lora(tiny_sd, out, adapter))
    options = FromFile(config=str(tiny_sd))
    single = forecast(dataclasses.replace(small_settings(file, out, QUICK), from_file=options))
    assert dataclasses.replace(fused, model="") == dataclasses.replace(plain, model="")
    assert dataclasses.replace(single, model="") == dataclasses.replace(plain, model="")
    assert files_in(tmp_path) == before
    save_file({"lora_unet_nowhere.alpha": torch.ones(1)}, adapter)
    with pytest.raises(SdqError, match="lora_unet_nowhere"):
        forecast(with_lora(tiny_sd, out, adapter))


def test_a_single_file_is_converted_into_the_run(tiny_sd: Path, tmp_path: Path) -> None:
    file = write_file(original_state("sd", tiny_sd), tmp_path / "model.safetensors")
    adapter = write_adapter(tmp_path / "a.safetensors")
    options = FromFile(config=str(tiny_sd))
    settings = dataclasses.replace(small_settings(file, tmp_path / "run", QUICK), from_file=options)
    plain, _ = prepared(settings)
    torch.testing.assert_close(plain.denoiser.state_dict(), load_source(tiny_sd).denoiser.state_dict(), rtol=0, atol=0)
    fused, ran = prepared(dataclasses.replace(settings, loras=(Lora(adapter),)))
    expected, _ = prepared(with_lora(tiny_sd, tmp_path / "other", adapter))
    assert ran == ["prepare"]
    torch.testing.assert_close(fused.denoiser.state_dict(), expected.denoiser.state_dict(), rtol=0, atol=0)
    assert "does not say under which licence" in (fused.folder / "NOTICE").read_text("utf-8")


def test_the_command_line_says_so_in_a_sentence(
    tiny_sd: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dry-run` with an adapter writes nothing; `--model` is checked; options that mean nothing are refused."""
    adapter, prompts = write_adapter(tmp_path / "a.safetensors"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle number {index}" for index in range(10)), encoding="utf-8")
    other = Path(shutil.copytree(tiny_sd, tmp_path / "other"))
    config = other / "text_encoder/config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    small = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    train = ["train", tiny_sd, "--out", tmp_path / "run", "--recipe", "shapes-64", "--prompts", prompts, *small]
    export = ["--out", tmp_path / "package"]
    before = files_in(tmp_path)
    cases = [
        ([*train, "--lora", f"{adapter}=0.5", "--dry-run"], 0, "Nothing was written."),
        ([*train, "--config", other], 1, "is no single file, and --config and --vae-from say how to convert one"),
        ([*train, "--vae-from", tmp_path / "v.safetensors"], 1, "v.safetensors does not exist"),
        (["export", finished_run, "--model", other, *export], 1, "the hash of text_encoder is not the same"),
        (["export", finished_run, "--config", other, *export], 1, "say how --model FILE is converted"),
        (["export", tiny_sd, "--model", other, *export], 1, "--model names the model of a RUN"),
    ]
    for arguments, code, words in cases:
        with pytest.raises(SystemExit) as exit_:
            main.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        said = " ".join((captured.out + captured.err).split())
        assert (exit_.value.code or 0) == code, said
        assert words in said
        assert "Traceback" not in said
    assert files_in(tmp_path) == before


def test_evaluation_finds_a_moved_model_by_the_reference(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    info = run / "checkpoint/quant.json"
    tree = json.loads(info.read_text("utf-8"))
    tree["source"]["model"] = str(tmp_path / "gone")
    info.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(SdqError, match=r"gone does not exist") as caught:
        open_candidates([str(run)])
    assert "--reference MODEL" in caught.value.hint
    (found,) = open_candidates([str(run)], reference=str(tiny_sd))
    assert found.model_folder == str(tiny_sd.resolve())
    assert find_reference([found]).model_folder == found.model_folder
