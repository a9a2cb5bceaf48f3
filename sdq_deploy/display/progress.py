"""Progress of long work: bars on a terminal; a plain line per stage and per minute in a log file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["LineProgress", "Status", "progress_on", "status_on"]

_EVERY = 60.0
"""Seconds between two lines of one task."""


class LineProgress(Progress):
    """A `Progress` that writes lines: where a task begins, each minute while it goes on, and where it ends."""

    def __init__(self, console: Console, **options: Any) -> None:
        super().__init__(console=console, **options)
        self._told: dict[TaskID, float] = {}

    def start(self) -> None:
        """Nothing is drawn."""

    def stop(self) -> None:
        """Nothing was drawn."""

    def add_task(self, description: str, *arguments: Any, **options: Any) -> TaskID:
        """As `Progress`; says that it begins."""
        task = super().add_task(description, *arguments, **options)
        self._told[task] = self.get_time()
        self._say(f"{description} ...")
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As `Progress`."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As `Progress`."""
        super().update(task_id, **changes)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        task, now = self.tasks[task_id], self.get_time()
        if task_id not in self._told:
            return
        if task.finished:
            del self._told[task_id]
            self._say(f"{task.description}: done in {task.finished_time or 0:.0f} s")
        elif now - self._told[task_id] >= _EVERY:
            self._told[task_id] = now
            total = "" if task.total is None else f" of {task.total:.0f}"
            self._say(f"{task.description}: {task.completed:.0f}{total} after {task.elapsed or 0:.0f} s")

    def _say(self, line: str) -> None:
        if not self.disable:
            self.console.print(line, markup=False, soft_wrap=True)


class Status(Protocol):
    """What is being done now."""

    def update(self, status: str) -> None:
        """Say it."""
        ...


class _Lines:
    """A status that writes a line for each thing that is done."""

    def __init__(self, console: Console) -> None:
        self.console, self.last = console, ""

    def update(self, status: str) -> None:
        if status != self.last:
            self.last = status
            self.console.print(f"{status} ...", markup=False, soft_wrap=True)


def progress_on(console: Console) -> Progress:
    """A bar with counts and elapsed time a task, or lines where the console is no terminal."""
    if not console.is_terminal:
        return LineProgress(console)
    columns = (SpinnerColumn(), TextColumn("[progress.description]{task.description}"), BarColumn())
    return Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console)


@contextmanager
def status_on(console: Console, text: str) -> Iterator[Status]:
    """A line with a spinner for a block, or a line for each update where the console is no terminal."""
    if console.is_terminal:
        with console.status(text) as status:
            yield status
    else:
        lines = _Lines(console)
        lines.update(text)
        yield lines
