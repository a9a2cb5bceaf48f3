"""The files of a checkpoint that loading reads: which they are, their hash by part, how weights are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from sdq_engines.errors import SdqError
from sdq_engines.files import sha256_file

if TYPE_CHECKING:
    from sdq_export.source import Source

__all__ = [
    "INDEX_FILE",
    "checkpoint_files",
    "identity_of",
    "part_hashes",
    "require_same_model",
    "stored_dtype",
    "stored_variant",
]

INDEX_FILE = "model_index.json"

_PAPERS = ("LICENSE*", "NOTICE*", "README.md")
_SETTINGS = ("*.json", "*.txt", "*.model")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_files(source: Source) -> list[str]:
    """Names, relative to the folder, of all that belongs to the checkpoint as it is loaded, its licence with it.

    Weights of another variant, other formats and parts that the family does not use are not among them.
    """
    papers = [path.name for pattern in _PAPERS for path in sorted(source.folder.glob(pattern))]
    scheduler = [f"scheduler/{path.name}" for path in sorted((source.folder / "scheduler").glob("*.json"))]
    return [INDEX_FILE, *papers, *scheduler, *(name for part in source.family.parts for name in _of_part(source, part))]


def part_hashes(source: Source) -> dict[str, str]:
    """Part -> hash over its weights, configuration or tokenizer files; that of model_index.json with them.

    The scheduler is not among them: who depends on a sampler keeps its settings.
    """
    hashes = {INDEX_FILE: sha256_file(source.folder / INDEX_FILE)}
    for part in source.family.parts:
        lines = [f"{name} {sha256_file(source.folder / name)}" for name in _of_part(source, part)]
        hashes[part] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return hashes


def identity_of(hashes: Mapping[str, str]) -> str:
    """One hash for all parts, in hexadecimal."""
    lines = [f"{part} {digest}" for part, digest in sorted(hashes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def require_same_model(source: Source, sha256: str, parts: Mapping[str, str], what: str, hint: str) -> None:
    """Refuse a model that is not the one which these hashes were taken of.

    Args:
        source: the model that is here.
        sha256: of the other, over all parts.
        parts: of the other, part by part, so that the sentence can name those that differ; may be empty.
        what: begins the sentence, e.g. "The run r was not trained from m".
        hint: what to do.

    Raises:
        SdqError: the hashes differ.
    """
    if source.sha256 == sha256:
        return
    differing = sorted(part for part in {*source.hashes, *parts} if source.hashes.get(part) != parts.get(part))
    named = ", ".join(differing) if parts else "the model"
    raise SdqError(f"{what}: the hash of {named} is not the same.", hint)


def stored_dtype(source: Source, part: str) -> torch.dtype:
    """What a part's weights are stored in; FP32 where that is neither FP16 nor BF16."""
    with safe_open(source.weight_files(part)[0], "pt") as opened:
        name = opened.get_slice(next(iter(opened.keys()))).get_dtype()
    return _DTYPES.get(name, torch.float32)


def stored_variant(source: Source, part: str) -> str | None:
    """The variant in the names of a part's weight files, "fp16" or None."""
    return "fp16" if all(".fp16" in file.name for file in source.weight_files(part)) else None


def _of_part(source: Source, part: str) -> list[str]:
    folder = source.folder / part
    weights = source.weight_files(part) if part in source.weighted_parts else []
    settings = sorted({path for pattern in _SETTINGS for path in folder.glob(pattern) if path.is_file()})
    return [f"{part}/{path.name}" for path in [*settings, *weights]]
