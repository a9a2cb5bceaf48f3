"""Names in a manifest that would lead outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sdq_engines.errors import SdqError
from sdq_engines.package.layout import MANIFEST
from sdq_engines.package.schema import Manifest

__all__ = ["check_paths", "is_inside"]

_AGAIN = "Do not use this package; get it again from its source."


def is_inside(relative: str) -> bool:
    """Whether a manifest's path is a plain relative POSIX path: no root, no drive, no "..", no backslash."""
    path = PurePosixPath(relative)
    plain = bool(relative) and str(path) == relative and not path.is_absolute() and path.parts != (".",)
    return plain and ".." not in path.parts and not any(mark in relative for mark in "\\:\0")


def check_paths(root: Path, manifest: Manifest) -> None:
    """Every path of the manifest stays inside the package, and what it refers to is among its files.

    Raises:
        SdqError: naming the path.
    """
    for relative in manifest.files:
        if not is_inside(relative) or relative == MANIFEST:
            raise SdqError(f"The manifest of {root} names a file outside the package: {relative!r}.", _AGAIN)
    for role, relative in _references(manifest):
        if not is_inside(relative):
            raise SdqError(f"The manifest of {root} names a file outside the package: {relative!r} ({role}).", _AGAIN)
        if relative not in manifest.files:
            raise SdqError(f"The manifest of {root} refers to {relative!r} ({role}) without listing it.", _AGAIN)


def _references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, relative in manifest.components.items():
        yield name, relative
    for text in manifest.text:
        yield "tokenizer", text.tokenizer
    for engine, entry in manifest.engines.items():
        for name, relative in entry.components.items():
            yield f"engine {engine}, {name}", relative
