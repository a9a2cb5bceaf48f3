"""Files of a package that stay readable while others write to it.

A rebuilt engine's files get new names and the old ones are deleted; an export replaces all files. Who loads an engine
opens its files at once and reads them when they are needed: on POSIX an open file outlives its name, on Windows its
deletion waits.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdq_engines.errors import SdqError
from sdq_engines.locks import MANIFEST_LOCK, is_held
from sdq_engines.package.layout import ENGINES, MANIFEST

__all__ = ["HeldFile", "PackageChangedError", "hold", "while_unchanged"]

T = TypeVar("T")

_TRIES = 10


class PackageChangedError(SdqError):
    """The package was written to between two looks at it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"The package at {folder} was changed by another process while it was in use.", "Load it again."
        )


class HeldFile:
    """One open file; safe to read from several threads.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: it is gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = path.open("rb")
        self._lock = threading.Lock()

    def read(self) -> bytes:
        """The content as it was when it was opened."""
        with self._lock:
            self._handle.seek(0)
            return self._handle.read()

    def map(self) -> NDArray[np.uint8]:
        """The content as the system pages it in; memory of the process only where it is written to."""
        return np.memmap(self._handle, dtype=np.uint8, mode="c")

    @property
    def unchanged(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._handle.fileno()), self.path.stat())
        except OSError:
            return False


def hold(root: Path, relatives: Iterable[str]) -> dict[str, HeldFile]:
    """Open these files of the package.

    Raises:
        PackageChangedError: one is gone, which was there when the package was checked.
    """
    try:
        return {relative: HeldFile(root.joinpath(*relative.split("/"))) for relative in relatives}
    except FileNotFoundError as error:
        raise PackageChangedError(root) from error


def while_unchanged(root: Path, look: Callable[[], T]) -> T:
    """What `look` makes of a package whose graphs no one changed meanwhile; it looks again where someone did.

    Raises:
        PackageChangedError: it changes again and again.
        Exception: whatever `look` raises on a package at rest.
    """
    for _ in range(_TRIES):
        before = _manifest(root)
        try:
            made = look()
        except (SdqError, OSError):
            if _manifest(root) == before and not is_held(root, MANIFEST_LOCK):
                raise
        else:
            after = _manifest(root)
            if after == before or _without_engines(after) == _without_engines(before):
                return made
        _wait_for_writer(root)
    raise PackageChangedError(root)


def _manifest(root: Path) -> bytes | None:
    try:
        return (root / MANIFEST).read_bytes()
    except OSError:
        return None


def _without_engines(manifest: bytes | None) -> dict[str, Any]:
    """The files that keep their names when they change; an engine's have a new one each time it is built."""
    try:
        files = json.loads(manifest or b"")["files"]
        return {name: entry for name, entry in files.items() if not name.startswith(f"{ENGINES}/")}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {"manifest": manifest}


def _wait_for_writer(root: Path) -> None:
    """An export holds this lock while it moves its files in, some milliseconds; longer than seconds is not waited."""
    for _ in range(100):
        if not is_held(root, MANIFEST_LOCK):
            return
        time.sleep(0.05)
