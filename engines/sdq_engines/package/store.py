"""Open a package: nothing in it is parsed before its manifest, its paths and every hash have been checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from sdq_engines.arguments import as_folder
from sdq_engines.errors import SdqError
from sdq_engines.in_progress import what_was_killed
from sdq_engines.locks import JOB, MANIFEST_LOCK, holder, is_held
from sdq_engines.package.held import while_unchanged
from sdq_engines.package.layout import MANIFEST, model_file
from sdq_engines.package.links import check_link, check_links
from sdq_engines.package.paths import check_paths
from sdq_engines.package.schema import SCHEMA_VERSION, EngineEntry, Manifest
from sdq_engines.package.verify import check_files
from sdq_engines.validation import first_mistake

__all__ = ["Package", "Verify", "open_package", "read_manifest"]

#: "full" hashes every file; "cached" hashes those whose size or time changed since the last full check.
Verify = Literal["full", "cached"]


@dataclass(frozen=True)
class Package:
    """A package whose manifest and files have been checked."""

    folder: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """The file of this name in the manifest, on this machine."""
        return self.folder.joinpath(*relative.split("/"))

    def component(self, name: str) -> Path:
        """The canonical ONNX graph of a component."""
        return self.path(self.manifest.components.get(name, model_file(name)))

    def engine(self, name: str) -> EngineEntry:
        """The engine's entry.

        Raises:
            SdqError: the package has no such engine.
        """
        entry = self.manifest.engines.get(name)
        if entry is None:
            has = ", ".join(self.manifest.engines) or "none"
            raise SdqError(
                f"The package at {self.folder} has no engine {name!r}; it has: {has}.",
                f"Build it: sdq-deploy build {self.folder} --engine {name}",
            )
        return entry

    def files_of(self, entry: EngineEntry) -> list[str]:
        """What an engine loads, weights beside a graph included."""
        named = list(entry.components.values())
        return [*named, *(f"{name}.data" for name in named if f"{name}.data" in self.manifest.files)]


def open_package(folder: str | Path, verify: Verify = "full", on_bytes: Callable[[int], None] | None = None) -> Package:
    """Check a package and return it.

    Args:
        folder: the package's folder.
        verify: "full" hashes every file; "cached" trusts files whose size and modification time are those of the last
            full check on this machine (see `package.verify`).
        on_bytes: hears how many bytes were hashed, for a progress bar.

    Raises:
        SdqError: `verify` is neither; `folder` is no path; it is not a package, it was written by a newer sdq-deploy,
            a path leads outside it, a symlink leads outside it, or a file is missing or changed. Each names the file
            and the command that mends it.
    """
    if verify not in get_args(Verify):
        raise SdqError(f"verify is {verify!r}; 'full' or 'cached' is wanted.", "Leave it out to hash every file.")
    root = as_folder(folder, "folder")

    def check() -> Package:
        manifest = read_manifest(root)
        check_paths(root, manifest)
        check_links(root)
        check_files(root, manifest, cached=verify == "cached", on_bytes=on_bytes)
        return Package(root, manifest)

    return while_unchanged(root, check)


def read_manifest(root: Path) -> Manifest:
    """Read and check manifest.json alone; no other file is looked at."""
    if not root.is_dir():
        raise SdqError(
            f"There is no package at {root}: {_what(root)}.", "Make one: sdq-deploy export MODEL --out PACKAGE"
        )
    path = root / MANIFEST
    check_link(root, path)
    if not path.is_file():
        raise SdqError(
            f"{root} is not a package: it has no {MANIFEST}.", "Make one: sdq-deploy export MODEL --out PACKAGE"
        )
    content = _read_json(path)
    if content.get("kind") != "sdq-package":
        raise SdqError(
            f"{path} is not a package's manifest: its kind is {content.get('kind')!r}.", "Give a package's folder."
        )
    if content.get("status") == "incomplete":
        raise _incomplete(root)
    _check_version(root, content.get("schema_version"))
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise SdqError(
            f"{path} is damaged: {first_mistake(error)}.",
            "Get the package again from its source, or export it again.",
        ) from error


def _incomplete(root: Path) -> SdqError:
    if is_held(root, JOB) or is_held(root, MANIFEST_LOCK):
        who = holder(root, JOB) or "another process"
        return SdqError(f"The package at {root} is being written now ({who}).", "Wait until that has ended.")
    killed = what_was_killed(root)
    interrupted = f"The package at {root} is incomplete: its export was interrupted."
    return SdqError(f"{interrupted} {killed}" if killed else interrupted, "Run the same export again.")


def _what(root: Path) -> str:
    return "that is a file, a folder is wanted" if root.exists() else "the folder does not exist"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SdqError(f"{path} cannot be read as JSON: {error}.", "Get the package again from its source.") from error
    if not isinstance(content, dict):
        raise SdqError(
            f"{path} is not a package's manifest: it holds a {type(content).__name__}, not an object.",
            "Get the package again from its source.",
        )
    return content


def _check_version(root: Path, version: object) -> None:
    if not isinstance(version, int):
        raise SdqError(f"The package at {root} names no schema version.", "Export it again.")
    if version > SCHEMA_VERSION:
        try:
            ours = metadata.version("sdq-deploy")
        except metadata.PackageNotFoundError:
            ours = "as installed here"
        raise SdqError(
            f"The package at {root} has schema version {version}; sdq-deploy {ours} reads up to {SCHEMA_VERSION}.",
            "Install a newer one: pip install --upgrade sdq-deploy",
        )
