"""Every file of the manifest is there with its size and its SHA-256; a repeated check may trust size and time.

The record of a full check lies in the platform's cache folder, outside the package, keyed by the package's path: the
manifest's own hash, and size and modification time (ns) of each file. It is a convenience against hashing gigabytes at
every start, not a protection against someone who can also set file times; "full" is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_text, sha256_file
from sdq_engines.package.layout import ENGINES, MANIFEST
from sdq_engines.package.schema import FileEntry, Manifest
from sdq_engines.places import cache_folder

__all__ = ["check_files"]

#: relative path -> (size in bytes, modification time in ns)
_Stamps = dict[str, tuple[int, int]]


def check_files(root: Path, manifest: Manifest, cached: bool, on_bytes: Callable[[int], None] | None = None) -> None:
    """Check presence, size and hash of every file that the manifest lists.

    Raises:
        SdqError: the first file that is missing, of another size, or of other content.
    """
    known = _recall(root) if cached else {}
    stamps: _Stamps = {}
    for relative, entry in manifest.files.items():
        path = root.joinpath(*relative.split("/"))
        stamps[relative] = _check_size(root, path, relative, entry)
        if known.get(relative) == stamps[relative]:
            if on_bytes is not None:
                on_bytes(entry.size)
            continue
        if sha256_file(path, on_bytes) != entry.sha256:
            raise SdqError(
                f"{relative} in the package at {root} is damaged: its hash is not the manifest's.", _mend(relative)
            )
    _remember(root, stamps)


def _check_size(root: Path, path: Path, relative: str, entry: FileEntry) -> tuple[int, int]:
    if not path.is_file():
        raise SdqError(f"The package at {root} lacks the file {relative}.", _mend(relative))
    stat = path.stat()
    if stat.st_size != entry.size:
        raise SdqError(
            f"{relative} in the package at {root} is damaged: it has {stat.st_size} bytes, not {entry.size}.",
            _mend(relative),
        )
    return stat.st_size, stat.st_mtime_ns


def _mend(relative: str) -> str:
    parts = relative.split("/")
    if parts[0] == ENGINES and len(parts) > 2:
        return f"Build the engine again: sdq-deploy build PACKAGE --engine {parts[1]}, or get the package again."
    return "Get the package again from its source, or export it again: sdq-deploy export RUN --out PACKAGE"


def _record(root: Path) -> Path:
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]
    return cache_folder() / "verified" / f"{key}.json"


def _recall(root: Path) -> _Stamps:
    """The stamps of the last full check; empty if there was none or the manifest changed since."""
    try:
        record = json.loads(_record(root).read_text(encoding="utf-8"))
        if record["manifest"] != sha256_file(root / MANIFEST):
            return {}
        return {name: (int(size), int(time)) for name, (size, time) in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(root: Path, stamps: _Stamps) -> None:
    # A cache folder that cannot be written costs the next start a full check, nothing else.
    with contextlib.suppress(OSError):
        record = {"manifest": sha256_file(root / MANIFEST), "files": stamps}
        path = _record(root)
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
            atomic_write_text(path, json.dumps(record))
