"""What the commands share: consoles, the --json switch, progress, and the extras they need."""

from __future__ import annotations

import importlib.util
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import Progress

from sdq_deploy.cli.progress import Status, progress_on, status_on
from sdq_engines.errors import SdqError

__all__ = [
    "ConfigOption",
    "Interrupted",
    "InterruptibleGroup",
    "JsonOption",
    "VaeFromOption",
    "console",
    "new_progress",
    "new_status",
    "print_json",
    "require_extra",
    "status_console",
]

#: Results go to standard output, progress and messages to standard error, so that a pipe sees results alone.
#: A prompt's ":x:" is no emoji.
console = Console(highlight=False, emoji=False)
status_console = Console(stderr=True, highlight=False, emoji=False)

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FOLDER|ID",
        help="Where the configuration of a MODEL in one file comes from: a diffusers folder or hub id, or a folder "
        "that has only tokenizer/.",
        show_default=False,
    ),
]
VaeFromOption = Annotated[
    Path | None,
    typer.Option(
        "--vae-from",
        metavar="FILE",
        help="Take the VAE of a MODEL in one file from this other file.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs to read.")]


class Interrupted(Exception):
    """Ctrl-C in a command; the message says how to go on."""


class InterruptibleGroup(typer.core.TyperGroup):
    """The app's group: keeps what a command had to say about Ctrl-C, which the parser would drop."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt)) from interrupt


def print_json(value: Any) -> None:
    """Print `value` as indented JSON on standard output, unstyled."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def new_progress() -> Progress:
    """The one progress display, on standard error."""
    return progress_on(status_console)


def new_status(text: str) -> AbstractContextManager[Status]:
    """The one display of what is being done where it cannot be counted, on standard error."""
    return status_on(status_console, text)


def require_extra(extra: str, *modules: str) -> None:
    """Check that an extra's modules are installed, without importing them.

    Raises:
        SdqError: one is missing; the hint is the pip command that brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise SdqError(
                f"This needs {module}, which is not installed.", f'Install it with: pip install "sdq-deploy[{extra}]"'
            )
