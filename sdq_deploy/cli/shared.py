"""What the commands share: JSON for machines, Ctrl-C, the extras that they need, and options of several of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from sdq_engines.errors import SdqError

__all__ = [
    "ConfigOption",
    "Interrupted",
    "InterruptibleGroup",
    "JsonOption",
    "VaeFromOption",
    "print_json",
    "require_extra",
]

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
