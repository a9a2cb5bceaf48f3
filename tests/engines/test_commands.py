"""Mistakes with packages on the command line: exit code 1, one sentence, a hint, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdq_deploy.cli.main import run
from sdq_engines.package.store import Package
from tests.engines.test_build import contents
from tests.engines.test_store import flip_byte


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with exit code 1; returns what it said, in one line."""

    def call(*arguments: object, code: int = 1) -> str:
        with pytest.raises(SystemExit) as caught:
            run([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert caught.value.code == code, said
        assert "Traceback" not in said
        return " ".join(said.split())

    return call


def test_a_package_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    for command in ("inspect", "verify", "bench"):
        assert "does not exist" in refused(command, tmp_path / "nowhere")
    assert "has no manifest.json" in refused("run", tmp_path, "a prompt", "--out", tmp_path / "image.png")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_package_is_refused_by_every_command_that_opens_it(
    refused: Callable[..., str], copy: Package, tmp_path: Path
) -> None:
    flip_byte(copy.folder / "denoiser" / "model.onnx")
    out = tmp_path / "image.png"
    for arguments in (("verify",), ("bench",), ("build", "--engine", "openvino")):
        assert "denoiser/model.onnx" in refused(arguments[0], copy.folder, *arguments[1:])
    assert "denoiser/model.onnx" in refused("run", copy.folder, "a prompt", "--out", out)
    assert not out.exists()


def test_names_that_are_not(refused: Callable[..., str], copy: Package, tmp_path: Path) -> None:
    assert "no engine 'onnx'" in refused("build", copy.folder, "--engine", "onnx")
    assert "no engine 'opnvino'" in refused("run", copy.folder, "a prompt", "--engine", "opnvino")
    assert "no component 'vae'" in refused("build", copy.folder, "--engine", "openvino", "--fp32", "vae")
    assert "no engine 'tensorrt'" in refused("run", copy.folder, "a prompt", "--engine", "tensorrt")
    refused("run", copy.folder, "a prompt", "--verify", "never", code=2)
    refused("run", copy.folder, code=2)


def test_what_the_package_cannot_do(refused: Callable[..., str], copy: Package, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    assert "exported with DDIMScheduler at 4 steps; 30 steps" in refused(
        "run", copy.folder, "a prompt", "--num-inference-steps", 30, "--out", out
    )
    assert "the scheduler euler was asked for" in refused(
        "run", copy.folder, "a prompt", "--scheduler", "euler", "--out", out
    )
    assert not out.exists()


def test_an_output_that_is_a_folder(refused: Callable[..., str], copy: Package, tmp_path: Path) -> None:
    assert "is a folder" in refused("run", copy.folder, "a prompt", "--out", tmp_path)


def test_several_images_are_numbered(copy: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "image.png"
    with pytest.raises(SystemExit) as caught:
        run(["run", str(copy.folder), "red", "green", "-n", "2", "--seed", "3", "--out", str(out), "--json"])
    assert caught.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"image-{i}.png" for i in range(4)]
    assert report["seeds"] == [3, 4, 5, 6]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_a_build_exits_130_and_leaves_the_package_as_it_was(copy: Package) -> None:
    before = contents(copy.folder)
    command = [sys.executable, "-m", "sdq_deploy.cli.main", "build", str(copy.folder), "--engine", "openvino"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(copy.folder.glob("engines/.building-*/job.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the builder as well
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert contents(copy.folder) == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_disk_without_room_is_one_sentence_and_the_package_is_as_it_was(copy: Package) -> None:
    """A limit on file sizes stands for the full disk: the builder's writes fail halfway, as there."""
    before = contents(copy.folder)
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
    code += "import sys; from sdq_deploy.cli.main import run; run(sys.argv[1:])"
    command = [sys.executable, "-c", code, "build", str(copy.folder), "--engine", "openvino"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr
    assert "openvino cannot write: File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(copy.folder) == before


def test_bench_reports_components_and_the_loop(copy: Package, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["bench", str(copy.folder), "--engine", "openvino", "--runs", "3", "--json"])
    assert caught.value.code == 0
    (report,) = json.loads(capsys.readouterr().out)["engines"]
    assert set(report["components"]) == {"text_encoder", "prologue", "denoiser", "vae_decoder"}
    assert report["end_to_end"]["median"] > report["components"]["denoiser"]["median"] > 0
    assert 0 <= report["loop_outside_engine"] < 1
