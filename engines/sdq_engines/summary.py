"""A package's own account of itself, from the manifest alone, as plain data for a table or for JSON."""

from __future__ import annotations

from typing import Any

from sdq_engines.package.layout import COMPONENTS, ENGINES, OPTIONAL_COMPONENTS
from sdq_engines.package.schema import Manifest

__all__ = ["sizes_on_disk", "summary"]


def sizes_on_disk(manifest: Manifest) -> dict[str, int]:
    """Bytes of each component, of each engine ("engines/<name>"), of everything else ("other"), and "total"."""
    components = (*COMPONENTS, *(name for name in OPTIONAL_COMPONENTS if name in manifest.components))
    sizes = dict.fromkeys(components, 0) | {f"{ENGINES}/{name}": 0 for name in manifest.engines} | {"other": 0}
    for relative, entry in manifest.files.items():
        parts = relative.split("/")
        key = "/".join(parts[:2]) if parts[0] == ENGINES else parts[0]
        sizes[key if key in sizes else "other"] += entry.size
    return {**sizes, "total": sum(sizes.values())}


def summary(manifest: Manifest) -> dict[str, Any]:
    """The manifest without its list of files, with sizes instead."""
    content = manifest.model_dump(mode="json", exclude={"files"})
    return {**content, "files": len(manifest.files), "bytes": sizes_on_disk(manifest)}
