"""The two consoles, and the one progress display and the one status display on them."""

from __future__ import annotations

from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import Progress

from sdq_deploy.display.progress import Status, progress_on, status_on

__all__ = ["console", "new_progress", "new_status", "status_console"]

#: Results go to standard output, progress and messages to standard error, so that a pipe sees results alone.
#: A prompt's ":x:" is no emoji.
console = Console(highlight=False, emoji=False)
status_console = Console(stderr=True, highlight=False, emoji=False)


def new_progress() -> Progress:
    """The one progress display, on standard error."""
    return progress_on(status_console)


def new_status(text: str) -> AbstractContextManager[Status]:
    """The one display of what is being done where it cannot be counted, on standard error."""
    return status_on(status_console, text)
