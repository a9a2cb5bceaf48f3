"""`sdq-deploy`: the app, and the one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import errno
import re
import sys
from typing import Annotated, Any

import typer

from sdq_deploy.cli import demo, evaluate, export, packages, train
from sdq_deploy.cli.shared import Interrupted, InterruptibleGroup
from sdq_deploy.display.consoles import status_console
from sdq_deploy.processes import leave
from sdq_engines.errors import SdqError

__all__ = ["app", "run"]

_EPILOG = (
    "Start with sdq-deploy demo. For your own model: train, then export, then run; docs/quickstart.md has the steps."
)

app = typer.Typer(
    name="sdq-deploy",
    cls=InterruptibleGroup,
    help="Quantize Stable Diffusion, export it, and ship it as a package whose fidelity is measured.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for group in (train, export, evaluate, packages, demo):
    group.register(app)

#: Errors of the operating system that are the user's to mend, and what to say about them.
_OS_ERRORS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EROFS: "The output is on a read-only file system",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Operation not permitted",
    errno.EFBIG: "The file grew past the limit that is set here",
}

#: What a wrong call raises. Typer brings its own copy of click since 0.20 and shares click's before: take what it uses.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

#: How native libraries (safetensors, tokenizers) spell the operating system's code in their own exceptions.
_NATIVE_CODE = re.compile(r"\(os error (\d+)\)")

#: Where torch.save's own errors come from when a write fails, whatever the reason.
_TORCH_WRITE = ("PytorchStreamWriter failed", "inline_container.cc")


def _print_version(value: bool) -> None:
    if value:
        from sdq_deploy import __version__

        typer.echo(f"sdq-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _complain(message: str, hint: str = "") -> None:
    status_console.print("[bold red]error:[/] ", end="")
    status_console.print(message, markup=False, soft_wrap=True)
    if hint:
        status_console.print(hint, markup=False, soft_wrap=True)


def run(arguments: list[str] | None = None) -> None:
    """Entry point of the console script. Exits 0, 1 for an error, 2 for a wrong call, 130 for Ctrl-C."""
    try:
        code = app(args=arguments, standalone_mode=False)
        _exit(code if isinstance(code, int) else 0)
    except (Interrupted, KeyboardInterrupt, typer.Abort) as interrupt:
        status_console.print(f"\nInterrupted. {interrupt}".rstrip(), markup=False, soft_wrap=True)
        _exit(130)
    except _UsageError as error:
        error.show()
        _exit(2)
    except SdqError as error:
        _complain(error.message, error.hint)
        _exit(1)
    except Exception as error:
        sentence = _write_failure(error)
        if sentence is None:
            raise
        _complain(sentence, "What was finished before is kept.")
        _exit(1)


def _exit(code: int) -> None:
    leave(code)
    sys.exit(code)


def _write_failure(error: Exception) -> str | None:
    """What the operating system refused, as a sentence; None if that is not what happened."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (spelled := _NATIVE_CODE.search(str(error))):
        code = int(spelled.group(1))
    if code in _OS_ERRORS:
        where = getattr(error, "filename", None)
        return f"{_OS_ERRORS[code]}{f' ({where})' if where else ''}."
    if any(mark in str(error) for mark in _TORCH_WRITE):
        return "A file could not be written; the disk is probably full."
    return None


if __name__ == "__main__":
    run()
