"""Where a package comes from: licence, notice, what was changed, and the tools that made it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

from sdq_engines.package.schema import SourceInfo
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.source import Source

__all__ = ["notice", "source_info", "tool_versions", "what_is_missing"]

_TOOLS = ("sdq-deploy", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def source_info(source: Source, checkpoint: QuantizedCheckpoint | None) -> SourceInfo:
    """The manifest's record of the source checkpoint."""
    model = checkpoint.info.source.model if checkpoint else source.model
    return SourceInfo(
        model=str(model),
        revision=source.revision,
        sha256=source.sha256,
        license=_license_name(source),
        changes=" ".join(filter(None, [_changes(checkpoint), _told(source), what_is_missing(source)])),
    )


def notice(source: Source, info: SourceInfo) -> str:
    """The text of NOTICE: the source's own, if it brings one, and what was done to it."""
    own = source.folder / "NOTICE"
    carried = own.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if own.is_file() else ""
    return (
        f"{carried}This package was made by sdq-deploy from {info.model} (licence: {info.license}).\n"
        f"Changes: {info.changes}\n"
    )


def what_is_missing(source: Source) -> str | None:
    """A sentence for what the checkpoint's pipeline does and the package does not; None where that is nothing."""
    if all(source.index.get("safety_checker") or [None]):
        return "The checkpoint's safety checker is not part of the package: nothing looks at what the images show."
    return None


def tool_versions(names: Iterable[str] = _TOOLS) -> dict[str, str]:
    """Package -> version of those that are installed; by default of everything that had a hand in the graphs."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _changes(checkpoint: QuantizedCheckpoint | None) -> str:
    exported = "exported to ONNX with its timestep path and sampler precomputed"
    if checkpoint is None:
        return f"The model was {exported}; no weight was trained or quantized."
    return f"The denoiser was quantized to {checkpoint.spec.precision} by quantization-aware training and {exported}."


def _told(source: Source) -> str | None:
    """A sentence for textual inversions; None where there are none."""
    if not source.embeddings:
        return None
    names = ", ".join(f"{each.name} ({each.path.name})" for each in source.embeddings)
    return f"Textual inversions were added: {names}."


def _license_name(source: Source) -> str:
    """The ``license:`` of the model card's front matter, else the first line of the licence file, else "unknown"."""
    card = source.folder / "README.md"
    if card.is_file():
        found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found.group(1)
    if source.license_file is not None:
        lines = source.license_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in lines if line.strip()), "unknown")
    return "unknown"
