"""Files that are either whole or absent: one atomic writer, one hash, one claim on an output folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from sdq_engines.errors import SdqError
from sdq_engines.in_progress import IN_PROGRESS
from sdq_engines.locks import JOB, LOCK_FILES, busy, is_held, sole_writer

__all__ = [
    "FolderKind",
    "atomic_write",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "claim_output",
    "claimed_folder",
    "folder_kind",
    "make_writable",
    "remove_empty_parents",
    "sha256_file",
]

FolderKind = Literal["run", "package", "demo", "evaluation"]

_PROBE = ".writable."

#: The file that makes a folder ours, and the value of its "kind" field.
MARKERS: dict[FolderKind, tuple[str, str]] = {
    "run": ("run.json", "sdq-run"),
    "package": ("manifest.json", "sdq-package"),
    "demo": ("demo.json", "sdq-demo"),
    "evaluation": ("evaluation.json", "sdq-evaluation"),
}


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`.

    The temporary file is in the same folder, so the rename is atomic (`os.replace`, on Windows too) and a full disk
    is noticed before anything is replaced. If the block raises, the temporary file is removed and `path` is as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        # Windows flushes only a handle that is open for writing.
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends, whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The file's SHA-256 in hexadecimal, read in blocks of 1 MiB; `on_bytes` hears the size of each block."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def folder_kind(folder: str | Path) -> FolderKind | None:
    """Which of our folders this is by its marker file; None if it is none of them."""
    for kind, (name, value) in MARKERS.items():
        try:
            content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("kind") == value:
            return kind
    return None


def claim_output(folder: str | Path, kind: FolderKind) -> Path:
    """Make `folder` if need be and check that it may be written: it is new, empty, or already one of ours of this kind.

    Raises:
        SdqError: the path is a file, the folder holds something else, or it cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise SdqError(f"The output {path} is a file, a folder is wanted.", "Give another --out.")
    if path.is_dir() and not _is_empty(path) and folder_kind(path) != kind:
        article = "an" if kind[0] in "aeiou" else "a"
        raise SdqError(
            f"The output folder {path} exists and was not made by sdq-deploy as {article} {kind}; nothing was written.",
            "Give a new folder with --out, or empty this one yourself.",
        )
    make_writable(path)
    return path


@contextlib.contextmanager
def claimed_folder(folder: str | Path, kind: FolderKind, doing: str) -> Iterator[Path]:
    """`claim_output` for a block in which no other command may write to the folder.

    A folder that was not there before is not there after a block that left it empty.

    Args:
        folder: what to write to.
        kind: whose it is to be.
        doing: what for, e.g. "export"; said to whoever else wants it.

    Raises:
        SdqError: as `claim_output`; or another command is writing to it.
    """
    existed = Path(folder).exists()
    try:
        path = claim_output(folder, kind)
    except SdqError as error:
        if is_held(Path(folder), JOB):  # its command has not yet said whose the folder is to be
            raise busy(Path(folder), JOB) from error
        raise
    try:
        with sole_writer(path, JOB, doing):
            yield claim_output(path, kind)  # once more: another may have just left it
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # not empty: something was written
                path.rmdir()


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing but what a command at work, or one that was killed before it wrote anything, has."""
    passing = (*LOCK_FILES, IN_PROGRESS)
    return all(path.name in passing or path.name.startswith(_PROBE) for path in folder.iterdir())


def make_writable(folder: Path) -> None:
    """Make `folder` if need be and prove that a file can be written into it.

    Raises:
        SdqError: it cannot, with the operating system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{_PROBE}{uuid.uuid4().hex[:8]}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SdqError(f"The output folder {folder} cannot be written: {error.strerror or error}.") from error


def remove_empty_parents(path: Path, root: Path) -> None:
    """Remove the folders that a file which is gone leaves empty, up to `root`, which stays."""
    for parent in path.parents:
        if parent == root or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()
