"""A folder as huggingface_hub keeps it: every file a symlink to a blob."""

from __future__ import annotations

from pathlib import Path

from sdq_engines.files import sha256_file

__all__ = ["into_hub_cache"]


def into_hub_cache(folder: Path, cache: Path) -> Path:
    """Copy a folder into a hub cache; returns its snapshot."""
    repository = cache / "models--someone--something"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = blobs / sha256_file(path)
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        above = "../" * (len(link.relative_to(repository).parts) - 1)
        link.symlink_to(f"{above}blobs/{blob.name}")
    return snapshot
