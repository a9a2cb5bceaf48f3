"""Write into a package: files first, each atomically, the manifest last."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sdq_engines.errors import SdqError
from sdq_engines.files import (
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    claim_output,
    remove_empty_parents,
    sha256_file,
)
from sdq_engines.package.layout import MANIFEST
from sdq_engines.package.paths import is_inside
from sdq_engines.package.schema import FileEntry, Manifest
from sdq_engines.package.store import Package

__all__ = ["PackageEditor"]


class PackageEditor:
    """Adds and drops files of one package; until `commit`, readers see the package as it was.

    Adding a file under a new name and dropping the old one therefore never breaks a package in use: `commit` replaces
    the manifest, then deletes the files that it no longer lists.
    """

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files: dict[str, FileEntry] = dict(manifest.files) if manifest else {}
        self._added: list[str] = []

    @classmethod
    def create(cls, folder: str | Path) -> PackageEditor:
        """Start a new package in a new, empty or our own folder; until `commit` it is marked as incomplete.

        Raises:
            SdqError: the folder holds something else, or cannot be written.
        """
        root = claim_output(folder, "package")
        atomic_write_json(root / MANIFEST, {"kind": "sdq-package", "status": "incomplete"})
        return cls(root, None)

    @classmethod
    def open(cls, package: Package) -> PackageEditor:
        """Change a checked package."""
        return cls(package.folder, package.manifest)

    def add_file(self, relative: str, source: str | Path) -> None:
        """Copy a file into the package under this POSIX path."""
        with self.new_file(relative) as temporary:
            shutil.copyfile(source, temporary)

    def add_bytes(self, relative: str, data: bytes) -> None:
        """Write a file of the package."""
        with self.new_file(relative) as temporary:
            temporary.write_bytes(data)

    def move_file(self, relative: str, source: Path) -> None:
        """Make a finished file from the same disk the package's file `relative`, without copying it."""
        with self.new_file(relative) as temporary:
            os.replace(source, temporary)

    @contextlib.contextmanager
    def new_file(self, relative: str) -> Iterator[Path]:
        """Yield a temporary path; when the block ends well it becomes the file `relative`, hashed and listed."""
        if not is_inside(relative) or relative == MANIFEST:
            raise SdqError(f"{relative!r} is not a path inside a package.")
        target = self.folder.joinpath(*relative.split("/"))
        with atomic_write(target) as temporary:
            yield temporary
            entry = FileEntry(size=temporary.stat().st_size, sha256=sha256_file(temporary))
        self._files[relative] = entry
        self._added.append(relative)

    def drop(self, relative: str) -> None:
        """Unlist a file; `commit` deletes it."""
        self._files.pop(relative, None)

    def commit(self, manifest: Manifest) -> Package:
        """Write `manifest` with the list of files as it now is, then delete what it no longer lists."""
        before = dict(self.manifest.files) if self.manifest else {}
        final = manifest.model_copy(update={"files": dict(sorted(self._files.items()))})
        atomic_write_text(self.folder / MANIFEST, final.model_dump_json(indent=2) + "\n")
        self._delete(name for name in before if name not in self._files)
        self.manifest, self._added = final, []
        return Package(self.folder, final)

    def abandon(self) -> None:
        """Delete what was added since the last commit under names that the package did not list."""
        listed = self.manifest.files if self.manifest else {}
        self._delete(name for name in self._added if name not in listed)
        self._added = []

    def _delete(self, names: Iterator[str]) -> None:
        for name in list(names):
            path = self.folder.joinpath(*name.split("/"))
            path.unlink(missing_ok=True)
            remove_empty_parents(path, self.folder)
