"""What the commands share: JSON for machines, Ctrl-C, and the extras that they need."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import typer
import typer.core

from sdq_engines.errors import SdqError

__all__ = [
    "Interrupted",
    "InterruptibleGroup",
    "print_json",
    "require_extra",
]


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
