"""Exports that are interrupted, by real signals to a real process: the old package stays, or nothing does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdq_deploy.cli import main
from sdq_engines.errors import SdqError
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import DENOISER, model_file
from sdq_engines.package.store import open_package
from sdq_export.source import Source
from sdq_export.writer import export_package
from tests.export.conftest import GUIDANCE, plan_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package without engines; copy it."""
    out = tmp_path_factory.mktemp("made") / "package"
    return export_package(source, out, plan_of(source, "ddim", 2), GUIDANCE).package.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def options(model: Path, out: Path) -> list[str]:
    return ["export", str(model), "--out", str(out), "--num-inference-steps", "3"]


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        errors="replace",  # of a read that ends inside of a bar
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "FORCE_COLOR": "1",
            **variables,
        },  # bars as on a terminal: they say where it is
        # A shell that runs the tests in the background has SIGINT ignored, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def said_until(process: subprocess.Popen[str], words: str) -> str:
    """Read the command's messages until they hold `words`."""
    assert process.stderr is not None
    said = ""
    while words not in said:
        character = process.stderr.read(1)
        assert character, said
        said += character
    return said


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, rest = process.communicate(timeout=300)
    return process.returncode, rest


@pytest.mark.parametrize(("stage", "replaced"), [("sampling with", False), ("capturing the denoiser", True)])
def test_ctrl_c_in_a_stage_leaves_what_was_there(
    tiny_sd: Path, made: Path, tmp_path: Path, stage: str, replaced: bool
) -> None:
    out = tmp_path / "package"
    if replaced:
        shutil.copytree(made, out)
    process = start("-m", "sdq_deploy.cli.main", *options(tiny_sd, out))
    said_until(process, stage)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert said.rstrip().endswith("Interrupted.")
    assert "Traceback" not in said
    assert contents(out) == contents(made) if replaced else not out.exists()


def test_a_second_export_into_a_folder_is_refused_and_the_first_goes_on(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "package"
    process = start("-m", "sdq_deploy.cli.main", *options(tiny_sd, out))
    said_until(process, "sampling with")
    with pytest.raises(SystemExit) as refused:
        main.run(options(tiny_sd, out))
    assert refused.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"is being written by another process (process {process.pid}, export, since" in said
    with pytest.raises(SdqError, match=f"is being written now .process {process.pid}, export"):
        open_package(out)
    assert finish(process)[0] == 0
    assert set(contents(out)) == {"manifest.json", *open_package(out, verify="full").manifest.files}


@pytest.mark.parametrize("replaced", [True, False])
def test_ctrl_c_while_files_are_replaced_puts_them_back(
    source: Source, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Where some of the new files are in their places: too short a time to be hit from outside.

    What Python makes of the signal is raised there, without the signal: in the process of a test worker it ended that.
    """
    out = tmp_path / "package"
    if replaced:
        shutil.copytree(made, out)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PackageEditor, "move_file", after_the_denoiser(interrupt))
    with pytest.raises(KeyboardInterrupt):
        export_package(source, out, plan_of(source, "ddim", 3), GUIDANCE)
    assert contents(out) == contents(made) if replaced else not out.exists()


def test_a_kill_while_files_are_replaced_is_never_read_as_a_package(tiny_sd: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "package"
    shutil.copytree(made, out)
    # A fork has this process's captures, which a new interpreter would spend half a minute on.
    process = multiprocessing.get_context("fork").Process(target=killed_export, args=(tiny_sd, out))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(SdqError, match="is incomplete: its export was interrupted"):
        open_package(out)
    with pytest.raises(SystemExit) as exit_:
        main.run(options(tiny_sd, out))
    assert exit_.value.code == 0
    package = open_package(out, verify="full")
    assert package.manifest.sampler.num_inference_steps == 3
    assert set(contents(out)) == {"manifest.json", *package.manifest.files}


def test_what_a_kill_leaves_is_named_and_removed_by_the_next_export(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Graphs that parity opens lie on the output's disk, and nowhere else."""
    out, system = tmp_path / "package", tmp_path / "system"
    system.mkdir()
    process = start("-m", "sdq_deploy.cli.main", *options(tiny_sd, out), TMPDIR=str(system))
    said_until(process, "capturing the denoiser")
    process.kill()
    finish(process)
    assert not list(system.glob("sdq*"))
    assert list(out.glob(".staging-*"))
    with pytest.raises(SdqError, match=r"its export was interrupted.* killed in the stage 'capturing the d"):
        open_package(out)
    with pytest.raises(SystemExit) as exit_:
        main.run(options(tiny_sd, out))
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "was killed in the stage 'capturing the denoiser', probably for want of memory" in said
    assert "GB were in use" in said
    assert set(contents(out)) == {"manifest.json", *open_package(out, verify="full").manifest.files}


def after_the_denoiser(happens: Callable[[], None]) -> Callable[[PackageEditor, str, Path], None]:
    """`PackageEditor.move_file` after which something happens once the denoiser is in its place."""
    move_file = PackageEditor.move_file

    def moved(self: PackageEditor, relative: str, source: Path) -> None:
        move_file(self, relative, source)
        if relative == model_file(DENOISER):
            happens()

    return moved


def killed_export(model: Path, out: Path) -> None:
    """The command, in a process of its own that is killed once the denoiser is in its place."""
    PackageEditor.move_file = after_the_denoiser(  # type: ignore[method-assign]
        lambda: os.kill(os.getpid(), signal.SIGKILL)
    )
    main.run(options(model, out))
