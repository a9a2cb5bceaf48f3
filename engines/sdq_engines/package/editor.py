"""Write into a package: files first, each atomically, the manifest last."""

from __future__ import annotations

import contextlib
import os
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
from sdq_engines.locks import MANIFEST_LOCK, sole_writer
from sdq_engines.package.layout import MANIFEST
from sdq_engines.package.paths import is_inside
from sdq_engines.package.schema import FileEntry, Manifest
from sdq_engines.package.store import Package, read_manifest

__all__ = ["PackageEditor"]


class PackageEditor:
    """Adds and drops files of one package; until `commit`, readers see the package as it was.

    Adding a file under a new name and dropping the old one therefore never breaks a package in use: `commit` replaces
    the manifest, then deletes the files that it no longer lists; who has opened one keeps it (`package.held`).
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
    @contextlib.contextmanager
    def edit(cls, folder: Path, doing: str) -> Iterator[PackageEditor]:
        """Change a package as its only writer, from its manifest as it is now; what is not committed is undone.

        Args:
            folder: the package.
            doing: what for, said to others who must wait: "build of openvino".

        Yields:
            The editor; its `current` is what to change.

        Raises:
            SdqError: another writer does not finish, the manifest is damaged, or the package cannot be written.
        """
        with sole_writer(folder, MANIFEST_LOCK, doing):
            editor = cls(folder, read_manifest(folder))
            try:
                yield editor
            except OSError as error:
                raise SdqError(f"The package at {folder} cannot be written: {error.strerror or error}.") from error
            finally:
                editor.abandon()

    @property
    def current(self) -> Manifest:
        """The manifest as it was when the editor was made, or as it was last committed."""
        assert self.manifest is not None
        return self.manifest

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

    def sweep(self, below: str) -> None:
        """Delete what lies below this folder and is not listed: left by a killed writer, or once open on Windows."""
        root = self.folder.joinpath(*below.split("/"))
        found = [path.relative_to(self.folder).as_posix() for path in root.rglob("*") if path.is_file()]
        self._delete(name for name in found if name not in self._files)

    def _delete(self, names: Iterator[str]) -> None:
        for name in list(names):
            path = self.folder.joinpath(*name.split("/"))
            with contextlib.suppress(PermissionError):  # Windows: open in another process; swept by the next build
                path.unlink(missing_ok=True)
                remove_empty_parents(path, self.folder)
