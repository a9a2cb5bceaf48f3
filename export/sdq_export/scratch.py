"""Temporary folders on the output's disk: graphs of several gigabytes do not belong on the system's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path

__all__ = ["scratch_in", "temporary_folder"]

_folder: ContextVar[Path | None] = ContextVar("scratch", default=None)


@contextmanager
def scratch_in(folder: Path) -> Iterator[None]:
    """Make the temporary folders of this block in `folder`, whose owner removes it, also after a crash."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def temporary_folder() -> AbstractContextManager[str]:
    """A folder for a block of code, where `scratch_in` says; the system's temporary folder outside of one."""
    return tempfile.TemporaryDirectory(prefix="sdq-", dir=_folder.get(), ignore_cleanup_errors=True)
