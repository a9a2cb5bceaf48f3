"""`accelerate launch` as docs/training-at-size.md says it: two nodes of one process each, on this machine."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from sdq_deploy.cli import main
from sdq_deploy.training.log import read_log
from sdq_export.checkpoint import load_checkpoint
from tests.deploy.launching import finish, kill, launch_nodes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.mark.long
def test_both_nodes_killed_in_the_fit_and_resumed_end_where_an_undisturbed_launch_ends(
    tiny_sd: Path, finished_run: Path, tmp_path: Path
) -> None:
    def command(out: Path) -> list[str | Path]:
        shutil.copytree(finished_run, out, dirs_exist_ok=True)
        return ["train", tiny_sd, "--out", out, "--resume", "--cpu", "--max-train-steps", "8",
                "--set", "fit.validate_every=8"]  # fmt: skip

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launch_nodes(*command(whole)))

    nodes = launch_nodes(*command(broken))
    resume = broken / "fit" / "resume.pt"
    while not resume.is_file():
        if any(node.poll() is not None for node in nodes):
            kill(nodes)
            pytest.fail("a node ended before its first resume point")
        time.sleep(0.02)
    kill(nodes)
    assert 0 < torch.load(resume, weights_only=True)["step"] < 8
    assert not (broken / "checkpoint").exists()
    finish(launch_nodes("train", tiny_sd, "--out", broken, "--resume", "--cpu"))

    wanted, found = read_log(whole / "log"), read_log(broken / "log")
    assert [record["step"] for record in found] == list(range(9))
    assert [record["loss"] for record in found[1:]] == [record["loss"] for record in wanted[1:]]
    tensors = load_checkpoint(broken).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_checkpoint(whole).tensors.items())


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_strategy_that_cuts_the_student_is_refused(
    tiny_sd: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher asks for it by a variable."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\nblue\n", encoding="utf-8")
    arguments = ["train", str(tiny_sd), "--out", str(tmp_path / "run"), "--prompts", str(prompts), "--cpu"]
    with pytest.raises(SystemExit) as exit_:
        main.run(arguments)
    assert exit_.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "is not supported" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
