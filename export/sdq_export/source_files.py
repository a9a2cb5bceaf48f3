"""The files of a checkpoint that loading reads: which they are, their hash by part, how weights are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from sdq_engines.files import sha256_file

__all__ = ["INDEX_FILE", "SourceFiles", "identity_of"]

INDEX_FILE = "model_index.json"

_PAPERS = ("LICENSE*", "NOTICE*", "README.md")
_SETTINGS = ("*.json", "*.txt", "*.model")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


class SourceFiles:
    """The files of a checkpoint in diffusers' layout.

    Args:
        folder: where it is.
        parts: folders of it that are read; other parts, formats and variants of weights are not among its files.
    """

    def __init__(self, folder: Path, parts: Iterable[str]) -> None:
        self.folder, self.parts = folder, tuple(parts)

    @property
    def weighted(self) -> list[str]:
        """The parts that have weights: denoiser, VAE, text encoders."""
        return [part for part in self.parts if not part.startswith("tokenizer")]

    def weights(self, part: str) -> list[Path]:
        """The part's safetensors: the plain ones where there are any, else the fp16 variant's."""
        files = sorted((self.folder / part).glob("*.safetensors"))
        plain = [file for file in files if ".fp16" not in file.name and ".non_ema" not in file.name]
        return plain or [file for file in files if ".fp16" in file.name]

    def weights_bytes(self, part: str) -> int:
        """Bytes of the weight files of a part."""
        return sum(file.stat().st_size for file in self.weights(part))

    def variant(self, part: str) -> str | None:
        """The variant in the names of a part's weight files, "fp16" or None."""
        return "fp16" if all(".fp16" in file.name for file in self.weights(part)) else None

    def dtype(self, part: str) -> torch.dtype:
        """What a part's weights are stored in; FP32 where that is neither FP16 nor BF16."""
        with safe_open(self.weights(part)[0], "pt") as opened:
            name = opened.get_slice(next(iter(opened.keys()))).get_dtype()
        return _DTYPES.get(name, torch.float32)

    def names(self) -> list[str]:
        """Names, relative to the folder, of all that belongs to the checkpoint as it is loaded, its licence with it."""
        papers = [path.name for pattern in _PAPERS for path in sorted(self.folder.glob(pattern))]
        scheduler = [f"scheduler/{path.name}" for path in sorted((self.folder / "scheduler").glob("*.json"))]
        return [INDEX_FILE, *papers, *scheduler, *(name for part in self.parts for name in self._names_of(part))]

    def hashes(self) -> dict[str, str]:
        """Part -> hash over its weights, configuration or tokenizer files; that of model_index.json with them.

        The scheduler is not among them: who depends on a sampler keeps its settings.
        """
        hashes = {INDEX_FILE: sha256_file(self.folder / INDEX_FILE)}
        for part in self.parts:
            lines = [f"{name} {sha256_file(self.folder / name)}" for name in self._names_of(part)]
            hashes[part] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return hashes

    def _names_of(self, part: str) -> list[str]:
        weights = self.weights(part) if part in self.weighted else []
        found = (path for pattern in _SETTINGS for path in (self.folder / part).glob(pattern))
        settings = sorted({path for path in found if path.is_file()})
        return [f"{part}/{path.name}" for path in [*settings, *weights]]


def identity_of(hashes: Mapping[str, str]) -> str:
    """One hash for all parts, in hexadecimal."""
    lines = [f"{part} {digest}" for part, digest in sorted(hashes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
