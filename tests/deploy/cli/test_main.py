"""How errors become sentences and exit codes."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdq_deploy.cli import main
from sdq_engines.errors import SdqError


@contextmanager
def command_that(action: Callable[[], None]) -> Iterator[None]:
    """A command `fails` for the length of the block, whose body raises for real."""
    main.app.command(name="fails")(action)
    try:
        yield
    finally:
        main.app.registered_commands.pop()


def outcome(action: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with command_that(action), pytest.raises(SystemExit) as exit_:
        main.run(["fails"])
    return exit_.value.code, capsys.readouterr().err


def test_a_user_error_is_a_sentence_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise SdqError("The [model] is not there.", "Give another.")

    code, text = outcome(fail, capsys)
    assert code == 1
    assert text == "error: The [model] is not there.\nGive another.\n"


def test_a_full_disk_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with open("/dev/full", "w") as device:
            device.write("x")

    if sys.platform != "linux":
        pytest.skip("/dev/full is Linux's")
    code, text = outcome(fail, capsys)
    assert code == 1
    assert text.startswith("error: The disk is full")
    assert "Traceback" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX's")
def test_a_write_that_is_refused_in_a_native_library_too(tmp_path: Path) -> None:
    """The process may write files of at most 64 kB: the same errors as a full disk, without filling one."""
    script = f"""
import resource, torch
from pathlib import Path
from safetensors.torch import save_file
from sdq_deploy.cli import main
tensor, path = torch.zeros(1 << 18), Path({str(tmp_path)!r}) / "tensor"
@main.app.command()
def safetensors() -> None: save_file({{"a": tensor}}, path)
@main.app.command()
def pickle() -> None: torch.save(tensor, path)
@main.app.command()
def python() -> None: path.write_bytes(bytes(1 << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for command in ("safetensors", "pickle", "python"):
    try:
        main.run([command])
    except SystemExit as exit_:
        print(command, exit_.code)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "safetensors 1\npickle 1\npython 1\n", result.stderr
    assert result.stderr.count("error: ") == 3
    assert "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.EBADF, "a bug of ours")

    with command_that(fail), pytest.raises(OSError, match="a bug of ours"):
        main.run(["fails"])


def test_control_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyboardInterrupt("Continue with: sdq-deploy train … --resume")

    code, text = outcome(fail, capsys)
    assert code == 130
    assert "Interrupted. Continue with: sdq-deploy train … --resume" in text


def test_a_demo_with_an_engine_that_is_none_ends_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.run(["demo", "--out", str(tmp_path / "demo"), "--engine", "tensorflow"])
    assert exit_.value.code == 1
    assert "There is no engine 'tensorflow'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("arguments", [["no-such-command"], ["run"], ["train", "--no-such-option"]])
def test_a_wrong_call_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.run(arguments)
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


COMMANDS = ["train", "export", "evaluate", "build", "run", "inspect", "verify", "doctor", "bench", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.run([command, "--help"])
    assert exit_.value.code == 0
    assert f"sdq-deploy {command}" in capsys.readouterr().out


def test_help_works_where_nothing_but_the_base_install_imports() -> None:
    """Every command's --help, with torch and all the engines' libraries made to fail on import."""
    blocked = ["torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime", "openvino", "tensorrt_rtx"]
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is not in a base install")
sys.meta_path.insert(0, Refuse())
from sdq_deploy.cli.main import run
for command in {COMMANDS!r}:
    try:
        run([command, "--help"])
    except SystemExit as exit_:
        assert exit_.code == 0, command
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_what_a_library_remarks_of_kernels_that_nothing_calls_is_not_shown() -> None:
    """bitsandbytes, which diffusers imports where it is there, of some CPUs."""
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not said.isEnabledFor(logging.WARNING)
    assert said.isEnabledFor(logging.ERROR)
