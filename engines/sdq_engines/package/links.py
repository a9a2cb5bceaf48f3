"""Symlinks in a package's folder: none, but for those of a hub cache, which lead to the cache's own blobs.

huggingface_hub keeps a repository as `models--OWNER--NAME/snapshots/REVISION/FILE`, each file a link to
`models--OWNER--NAME/blobs/HASH`. Such a link is followed, and what it leads to is hashed as any file is. Any other link
is refused, listed or not: a graph could name it as its external data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sdq_engines.errors import SdqError

__all__ = ["check_link", "check_links", "require_plain_weights"]

_PLAIN = "Get it again as plain files: hf download OWNER/NAME --local-dir PACKAGE"


def check_links(root: Path) -> None:
    """Check every file and folder below `root`.

    Raises:
        SdqError: naming the first symlink that is not followed.
    """
    for current, folders, files in os.walk(root, followlinks=False):
        for name in (*folders, *files):
            check_link(root, Path(current) / name)


def check_link(root: Path, path: Path) -> None:
    """Check one file or folder of the package.

    Raises:
        SdqError: it is a symlink that leads elsewhere than to the blobs of the hub cache that the package lies in.
    """
    if path.is_symlink() and not _leads_to_a_blob(root, path):
        raise SdqError(
            f"The package at {root} holds a symlink that leads out of it: {path.relative_to(root).as_posix()}.",
            _PLAIN,
        )


def require_plain_weights(root: Path, graphs: Iterable[str]) -> None:
    """Parsers of ONNX follow no link to weights beside a graph, which a graph of more than 1 GiB has.

    Args:
        root: the package's folder.
        graphs: names of its components' files.

    Raises:
        SdqError: the package is in a hub cache and has such a graph.
    """
    for relative in graphs:
        if root.joinpath(*f"{relative}.data".split("/")).is_symlink():
            raise SdqError(f"Engines are built from plain files, and {relative}.data is a link.", _PLAIN)


def _leads_to_a_blob(root: Path, path: Path) -> bool:
    repository = next((above.parent for above in root.resolve().parents if above.name == "snapshots"), None)
    return repository is not None and path.resolve().parent == repository / "blobs" and path.is_file()
