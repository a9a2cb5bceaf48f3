"""`sdq-deploy train` from outside: exit codes and sentences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdq_deploy.cli import main
from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.run import make_accelerator
from tests.commands import run
from tests.deploy.training.helpers import ROOT, SMALL


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sdq_deploy.cli.main", "train", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a red circle number {index}" for index in range(10)), encoding="utf-8")
    return path


def small_options() -> list[str]:
    return ["--recipe", "shapes-64", *(part for key, value in SMALL.items() for part in ("--set", f"{key}={value}"))]


def test_user_errors_are_one_sentence_and_write_nothing(
    tiny_sd: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    cases: list[tuple[list[str | Path], int, str]] = [
        ([tmp_path / "nothing", "--out", out, "--prompts", prompts], 1, "does not exist"),
        ([tmp_path, "--out", out, "--prompts", prompts], 1, "not a diffusers folder"),
        ([tiny_sd, "--out", out], 1, "needs prompts"),
        ([tiny_sd, "--out", out, "--prompts", empty], 1, "is empty"),
        ([tiny_sd, "--out", out, "--prompts", prompts, "--scheduler", "dimm"], 1, "--scheduler takes 'default'"),
        ([tiny_sd, "--out", out, "--prompts", prompts, "--precision", "w2a2"], 2, "w4a16"),
        ([tiny_sd, "--out", prompts, "--prompts", prompts], 1, "is a file"),
        ([tiny_sd, "--out", out, "--prompts", prompts, "--ptq-algorithm", "svdquant"], 1, "low-rank branch"),
        ([tiny_sd, "--out", out, "--prompts", prompts, "--method", "qat"], 2, "efficientdm"),
    ]
    for arguments, code, words in cases:
        with pytest.raises(SystemExit) as exit_:
            main.run(["train", *map(str, arguments)])
        said = " ".join(capsys.readouterr().err.split())
        assert exit_.value.code == code, said
        assert words in said
        assert "Traceback" not in said
        assert not out.exists() or not any(out.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals and resource limits of POSIX")
def test_a_full_disk_is_one_sentence(
    tiny_sd: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands in for a full disk; Python ignores the signal that comes with it."""
    import resource

    arguments = ["train", tiny_sd, "--out", tmp_path / "run", "--prompts", prompts, "--cpu", *small_options()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit_:
            main.run([str(argument) for argument in arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "Traceback" not in said
    assert "limit" in said.lower() or "disk" in said.lower()
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.export
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_names_the_command_that_continues_and_it_does(
    tiny_sd: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = command(tiny_sd, "--out", out, "--prompts", prompts, "--cpu", *small_options())
    # A shell that runs the tests in the background has SIGINT ignored, which a child would inherit.
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((out / "dataset").glob("training-*")) and process.poll() is None:
        time.sleep(0.05)
    with pytest.raises(SystemExit) as refused:  # one run is trained by one command at a time
        main.run(["train", str(tiny_sd), "--out", str(out), "--resume", "--cpu"])
    assert refused.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"is being written by another process (process {process.pid}, train, since" in said
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"sdq-deploy train {tiny_sd} --out {out} --resume" in stderr
    assert "Traceback" not in stderr
    run("train", tiny_sd, "--out", out, "--resume", "--cpu")
    assert "w4a8: " in capsys.readouterr().out
    run("train", tiny_sd, "--out", out, "--resume", "--cpu", "--json")
    assert '"stages_run": []' in capsys.readouterr().out


def test_a_process_may_train_twice_in_other_precisions() -> None:
    for precision in ("no", "bf16", "no"):
        recipe = load_recipe("shapes-64", {"fit.mixed_precision": precision})
        assert make_accelerator(recipe, cpu=True).mixed_precision == precision
