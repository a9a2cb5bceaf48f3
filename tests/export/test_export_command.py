"""`sdq-deploy export`: what it makes, and one sentence for each thing that it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdq_deploy.cli import main
from sdq_engines.package.store import open_package
from sdq_export.checkpoint import CHECKPOINT_FOLDER, save_checkpoint
from sdq_export.source import Source
from tests.export.conftest import plan_of
from tests.export.quantized import quantized_checkpoint


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must fail with code 1 and no traceback."""
    with pytest.raises(SystemExit) as exit_:
        main.run(["export", *arguments])
    text = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "Traceback" not in text
    return " ".join(text.split())


def exported(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.run(["export", *arguments])
    assert exit_.value.code == 0


@pytest.fixture
def run_folder(source: Source, tmp_path: Path) -> Path:
    """A finished training run, as `train` leaves it."""
    plan = plan_of(source, "ddim", 3)
    checkpoint = quantized_checkpoint(source, plan, "w4a8")
    folder = tmp_path / "run"
    save_checkpoint(folder / CHECKPOINT_FOLDER, checkpoint.info, checkpoint.tensors)
    (folder / "run.json").write_text(json.dumps({"kind": "sdq-run", "status": "complete"}))
    return folder


@pytest.mark.export
def test_a_model_becomes_a_package_with_an_engine(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "package"
    options = ["--scheduler", "euler-ancestral", "--num-inference-steps", "3", "--guidance-scale", "2.5"]
    exported([str(tiny_sd), "--out", str(out), *options, "--engine", "onnxruntime", "--batch", "1,2,2", "--json"])
    manifest = open_package(out).manifest
    said = capsys.readouterr()
    assert json.loads(said.out)["sampler"]["stochastic"] is True
    unfiltered = "The checkpoint's safety checker is not part of the package: nothing looks at what the images show."
    assert said.err.count(unfiltered) == 1
    assert (out / "NOTICE").read_text("utf-8").count(unfiltered) == 1
    assert manifest.precision == "fp16"
    assert manifest.sampler.guidance_scale == 2.5
    assert manifest.engines["onnxruntime"].profile.batch_opt == 2
    assert "engine:onnxruntime" in manifest.fidelity["parity"]
    with pytest.raises(SystemExit):
        main.run(["inspect", str(out)])
    shown = capsys.readouterr().out
    assert unfiltered in shown
    for criterion, figures in manifest.fidelity["parity"].items():
        assert f"{criterion} " in shown
        assert figures["says"] in shown


@pytest.mark.export
def test_a_run_becomes_a_quantized_package(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "package"
    exported([str(run_folder), "--out", str(out), "--text-encoder", "int8"])
    manifest = open_package(out).manifest
    assert manifest.precision == "w4a8"
    assert manifest.sampler.guidance_scale == 4.0
    assert manifest.engines == {}
    assert "text_encoder_int8" in manifest.fidelity["parity"]


def test_a_run_keeps_its_sampler(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run_folder), "--out", str(tmp_path / "p")]
    assert "trained for DDIMScheduler with 3 steps" in refused([*arguments, "--scheduler", "pndm"], capsys)
    assert "hold for no other sampler" in refused([*arguments, "--num-inference-steps", "4"], capsys)
    assert "stores its other weights in FP16" in refused([*arguments, "--dtype", "fp32"], capsys)
    assert not (tmp_path / "p").exists()


def test_an_unfinished_run_is_refused(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "run.json").write_text(json.dumps({"kind": "sdq-run", "status": "fit"}))
    message = refused([str(run_folder), "--out", str(tmp_path / "p")], capsys)
    assert "not finished: it stopped in the stage 'fit'" in message
    assert "--resume" in message
    (run_folder / "run.json").write_text("{")
    assert "cannot be read" in refused([str(run_folder), "--out", str(tmp_path / "p")], capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "dimm"], "There is no scheduler 'dimm'"),
        (["--engine", "tensorflow"], "There is no engine 'tensorflow'"),
        (["--dtype", "bf16"], "There is no dtype 'bf16'"),
        (["--text-encoder", "int2"], "--text-encoder takes int8 or int4, not 'int2'"),
        (["--vae", "int4"], "--vae takes int8, not 'int4'"),
        (["--vae", "fp16", "--dtype", "fp32"], "--vae takes int8, not 'fp16'"),
        (["--prologue", "int4"], "An INT4 prologue is for quantized packages"),
        (["--prompt-chunks", "0"], "--prompt-chunks takes 1 to 16, not 0"),
        (["--clip-skip", "-1"], "--clip-skip takes 0 or more layers, not -1"),
        (["--clip-skip", "2"], "clip_skip is 2, and the text_encoder of"),
        (["--embedding", "style.safetensors"], "--embedding takes NAME=FILE"),
        (["--embedding", "style=missing.safetensors"], "The embedding missing.safetensors does not exist"),
        (["--batch", "4,1"], "--batch takes three whole numbers"),
        (["--batch", "4,1,2"], "not ordered"),
        (["--batch", "0,1,2"], "--batch takes three whole numbers"),
        (["--scheduler", "lcm", "--num-inference-steps", "90"], "LCMScheduler cannot be compiled for 90 steps"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refused([str(tiny_sd), "--out", str(tmp_path / "p"), *options], capsys)
    assert not (tmp_path / "p").exists()


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused([str(tmp_path / "no-model"), "--out", str(tmp_path / "p")], capsys)


def test_an_output_that_is_not_ours(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    message = refused([str(tiny_sd), "--out", str(tmp_path), "--num-inference-steps", "2"], capsys)
    assert "was not made by sdq-deploy" in message
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_setting_that_is_not_linear_is_named(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = shutil.copytree(tiny_sd, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "thresholding": True}))
    message = refused([str(model), "--out", str(tmp_path / "p"), "--num-inference-steps", "5"], capsys)
    assert "DDIMScheduler with thresholding=True is not linear" in message
