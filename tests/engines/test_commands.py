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
from sdq_engines.build import build_engine
from sdq_engines.package.store import Package, open_package
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
    assert "no component 'vae'" in refused("build", copy.folder, "--engine", "openvino", "--bf16", "vae")
    said = refused("build", copy.folder, "--engine", "openvino", "--engine", "onnxruntime", "--bf16", "vae_decoder")
    assert "--bf16 changes nothing for openvino and onnxruntime" in said
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


@pytest.mark.parametrize("name", ["a.xyz", "a.jpg", "a"])
def test_an_output_of_another_format(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    """Before the package is looked at, which here is none."""
    said = refused("run", tmp_path, "a prompt", "--out", tmp_path / name)
    assert "does not end in .png, and PNG is the one format" in said
    assert str(tmp_path / "a.png") in said
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(refused: Callable[..., str], copy: Package, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside_a_file = tmp_path / "file" / "image.png"
    assert "cannot be written: File exists" in refused("run", copy.folder, "a prompt", "--out", inside_a_file)
    if sys.platform == "linux":
        assert "/sys/x cannot be written" in refused("run", copy.folder, "a prompt", "--out", "/sys/x/image.png")


def test_several_images_are_numbered(copy: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "image.png"
    with pytest.raises(SystemExit) as caught:
        run(["run", str(copy.folder), "red", "green", "-n", "2", "--seed", "3", "--out", str(out), "--json"])
    assert caught.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"image-{i}.png" for i in range(4)]
    assert report["seeds"] == [3, 4, 5, 6]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("command", [["bench", "--runs", "1000000"], ["run", "a red circle", "-n", "1000000"]])
def test_ctrl_c_in_a_long_command_exits_130(copy: Package, tmp_path: Path, command: list[str]) -> None:
    name, *options = command
    arguments = [name, str(copy.folder), *options, *(["--out", str(tmp_path / "image.png")] if name == "run" else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdq_deploy.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "FORCE_COLOR": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    said = ""
    while not any(word in said for word in ("denois", "onnxruntime:")):
        character = process.stderr.read(1)
        assert character, said
        said += character
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, said + rest
    assert "Interrupted." in rest
    assert "Traceback" not in rest
    assert not list(tmp_path.glob("*.png"))


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_build_that_is_killed_leaves_the_package_whole(copy: Package, number: signal.Signals) -> None:
    before = contents(copy.folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "sdq_deploy.cli.main", "build", str(copy.folder), "--engine", "openvino"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(copy.folder.glob("engines/.building-*/job.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)  # to the command alone
    assert process.wait(timeout=60) == -number
    while group_lives(process.pid) and time.monotonic() < deadline:  # its builder ends as well
        time.sleep(0.02)
    assert not group_lives(process.pid)
    assert not list(copy.folder.glob("engines/.building-*/result.json"))
    assert {name: digest for name, digest in contents(copy.folder).items() if ".building-" not in name} == before
    package = open_package(copy.folder)
    assert package.manifest == copy.manifest
    build_engine(package, "openvino")
    open_package(copy.folder)


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
