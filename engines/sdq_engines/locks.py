"""One writer per folder: a lock file in it, held by the operating system for as long as the process lives.

Two locks, for two lengths of time:

1. `JOB`: a command that fills a folder (export, train, evaluate, demo) holds it from start to end; a second one is
   refused at once, with the first one's name.
2. `MANIFEST_LOCK`: whoever reads a package's manifest, changes it and writes it again holds it for that moment; others
   wait.

filelock does the work: `flock` on POSIX (over NFS 4 too), `LockFileEx` on Windows, and a marker file where a file
system has neither. A killed holder's lock is free at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from sdq_engines.errors import SdqError

__all__ = ["JOB", "LOCK_FILES", "MANIFEST_LOCK", "busy", "holder", "is_held", "sole_writer"]

JOB = ".sdq-job.lock"
MANIFEST_LOCK = ".sdq-manifest.lock"

#: Files that say nothing about whether a folder is empty, or whose it is.
LOCK_FILES = frozenset({JOB, MANIFEST_LOCK})

_WAITS = {JOB: 0.2, MANIFEST_LOCK: 60.0}
"""Seconds to wait; changing a manifest takes milliseconds, moving a package's files some more."""

_QUIET_WAIT = 1.0
"""Seconds after which a wait is told."""

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def sole_writer(folder: Path, name: str, doing: str) -> Iterator[None]:
    """Be the folder's only writer of this kind for a block.

    Args:
        folder: exists.
        name: `JOB`, which refuses at once where another holds it, or `MANIFEST_LOCK`, which waits.
        doing: what is being done, for whoever is refused: "export", "build of openvino".

    Raises:
        SdqError: another process, or another thread of this one, holds it; or the folder cannot be written.
    """
    path = folder / name
    lock = FileLock(path, thread_local=False, poll_interval=0.02)
    try:
        _acquire(lock, folder, name)
    except Timeout as error:
        raise busy(folder, name) from error
    except OSError as error:
        raise SdqError(f"The folder {folder} cannot be written: {error.strerror or error}.") from error
    try:
        with contextlib.suppress(OSError):  # Windows keeps others, this handle too, from writing to it
            if not isinstance(lock, SoftFileLock):
                path.write_text(json.dumps(_who(doing)), encoding="utf-8")
        yield
    finally:
        # Unlinked while it is held: who waits for it sees that its file has no name left, and opens the new one.
        with contextlib.suppress(OSError):
            if not isinstance(lock, SoftFileLock):
                path.unlink()
        lock.release()


def _acquire(lock: BaseFileLock, folder: Path, name: str) -> None:
    """Take it, with a word where that takes a while."""
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=min(_QUIET_WAIT, _WAITS[name]))
        return
    if _WAITS[name] > _QUIET_WAIT:
        _logger.warning("Waiting for another process to finish writing %s: %s.", folder, holder(folder, name) or "…")
    lock.acquire(timeout=max(0.0, _WAITS[name] - _QUIET_WAIT))


def busy(folder: Path, name: str) -> SdqError:
    """What to raise where another holds the lock."""
    who = holder(folder, name) or "which does not say what it does"
    return SdqError(
        f"{folder} is being written by another process ({who}).", "Wait until it has ended, or give another folder."
    )


def is_held(folder: Path, name: str) -> bool:
    """Whether somebody holds this lock of the folder now."""
    path = folder / name
    if not path.is_file():
        return False
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:  # a read-only copy: nobody writes to it through this mount
        return False
    # what a killed process left
    with contextlib.suppress(OSError):
        path.unlink()
    lock.release()
    return False


def holder(folder: Path, name: str) -> str | None:
    """What the lock's holder says of itself: "process 4711, export, since 12:30:05"; None where it says nothing."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        since = time.strftime("%H:%M:%S", time.localtime(found["since"]))
        where = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['process']}{where}, {found['doing']}, since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _who(doing: str) -> dict[str, object]:
    return {"process": os.getpid(), "host": socket.gethostname(), "doing": doing, "since": time.time()}
