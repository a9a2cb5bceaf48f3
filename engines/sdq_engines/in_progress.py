"""A small file in an output folder while a command works there: which, in which stage, with how much memory.

The end of the command removes it, an error or Ctrl-C too. What is found there with nobody at work was killed, on most
machines for want of memory, and whoever meets it can say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdq_engines.locks import JOB, is_held
from sdq_engines.memory import resident_bytes

__all__ = ["IN_PROGRESS", "WorkInProgress", "in_progress", "what_was_killed"]

IN_PROGRESS = ".in-progress.json"

_POLL_SECONDS = 0.5
_GROWTH = 1.05
"""Memory is written down again when it has grown by this factor."""


class WorkInProgress:
    """The file of one command at work.

    Args:
        folder: the output folder; it exists.
        command: what is at work, e.g. "export".
    """

    def __init__(self, folder: Path, command: str) -> None:
        self._path, self._command, self._stage, self._most = folder / IN_PROGRESS, command, "starting", resident_bytes()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._write()

    def stage(self, name: str) -> None:
        """Begin a stage."""
        with self._lock:
            if name != self._stage:
                self._stage, self._most = name, resident_bytes()
                self._write()

    def watch(self) -> None:
        """Write memory down as it grows, until `end`; for a thread."""
        while not self._ended.wait(_POLL_SECONDS):
            with self._lock:
                if not self._ended.is_set() and (now := resident_bytes()) > _GROWTH * self._most:
                    self._most = now
                    self._write()

    def end(self) -> None:
        """Remove the file."""
        with self._lock:
            self._ended.set()
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"command": self._command, "stage": self._stage, "memory_bytes": self._most}
        temporary = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk is for the command itself to meet
            temporary.write_text(json.dumps(content), encoding="utf-8")
            os.replace(temporary, self._path)
            return
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def in_progress(folder: Path, command: str) -> Iterator[WorkInProgress]:
    """Keep the file for a block of code; it is gone at the end, whatever happened but a kill."""
    work = WorkInProgress(folder, command)
    watcher = threading.Thread(target=work.watch, daemon=True)
    watcher.start()
    try:
        yield work
    finally:
        work.end()
        watcher.join()


def what_was_killed(folder: str | Path) -> str | None:
    """A sentence on the command that was killed while it worked in this folder; None if none was, or it still works.

    One that works holds the folder's lock (`sdq_engines.locks.JOB`), which ends with its process.
    """
    try:
        found: dict[str, Any] = json.loads((Path(folder) / IN_PROGRESS).read_text(encoding="utf-8"))
        command, stage, memory = str(found["command"]), str(found["stage"]), int(found["memory_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_held(Path(folder), JOB):
        return None
    used = f"; {memory / 1e9:.1f} GB were in use" if memory else ""
    return f"The last {command} to {folder} was killed in the stage {stage!r}, probably for want of memory{used}."
