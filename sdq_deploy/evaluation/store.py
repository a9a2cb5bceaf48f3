"""The images of an evaluation on disk, in shards: any number of processes fills them, a killed one loses its shard.

OUT/images/<candidate>/00000.png …          one file an image
OUT/images/<candidate>/shard-00000.json     written last: what the shard was made from, and its latent errors
OUT/images/FP/shard-00000.safetensors       the reference's latents of every step, of the first images only
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdq_engines.files import atomic_write, atomic_write_json

__all__ = ["ImageStore", "Shard", "shards_of"]


@dataclass(frozen=True)
class Shard:
    """Images that are made together, always in the same company: numbers `first` to `first + len(prompts) - 1`.

    Attributes:
        traced: how many of them, from the first, have their latents compared step by step.
    """

    first: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    traced: int

    def fingerprint(self, *parts: str) -> str:
        """Hash of these prompts and seeds and of what they are drawn with."""
        content = json.dumps([self.first, self.prompts, self.seeds, self.traced, *parts])
        return hashlib.sha256(content.encode()).hexdigest()


def shards_of(prompts: Sequence[str], seeds: Sequence[int], size: int, traced: int) -> list[Shard]:
    """Cut a prompt set into shards of `size` images, the first `traced` images of all traced."""
    return [
        Shard(
            first,
            tuple(prompts[first : first + size]),
            tuple(seeds[first : first + size]),
            max(0, min(traced - first, size, len(prompts) - first)),
        )
        for first in range(0, len(prompts), size)
    ]


class ImageStore:
    """One candidate's images.

    Args:
        folder: the evaluation's `images` folder.
        name: of the candidate.
    """

    def __init__(self, folder: Path, name: str) -> None:
        # A name may hold what a file system refuses, and two names may differ in nothing else.
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "candidate"
        unchanged = plain == name
        self.folder = folder / (plain if unchanged else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}")

    def is_whole(self, shard: Shard, fingerprint: str) -> bool:
        """Whether the shard is finished and was made from the same."""
        try:
            content = json.loads(self._marker(shard).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not isinstance(content, dict) or content.get("fingerprint") != fingerprint:
            return False
        return all(path.is_file() for path in self.paths(shard))

    def paths(self, shard: Shard) -> list[Path]:
        """What scoring reads of a shard: its images and its marker."""
        return [*(self.image_path(shard.first + i) for i in range(len(shard.prompts))), self._marker(shard)]

    def write(
        self,
        shard: Shard,
        fingerprint: str,
        images: NDArray[np.uint8],
        errors: NDArray[np.float64] | None = None,
        latents: NDArray[np.float32] | None = None,
    ) -> None:
        """Store a shard.

        Args:
            shard: whose images these are.
            fingerprint: what they were made from.
            images: uint8 [N, H, W, 3].
            errors: [traced, T], relative latent errors of a candidate.
            latents: FP32 [traced, T, C, h, w], of the reference.
        """
        # Until the new marker is there, the shard is not whole: half of it may be of an older candidate.
        self._marker(shard).unlink(missing_ok=True)
        for offset, image in enumerate(images):
            with atomic_write(self.image_path(shard.first + offset)) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
        if latents is not None:
            from safetensors.numpy import save_file

            with atomic_write(self._latents(shard)) as temporary:
                save_file({"latents": np.ascontiguousarray(latents, np.float32)}, temporary)
        listed = None if errors is None else [[float(value) for value in row] for row in errors]
        atomic_write_json(self._marker(shard), {"fingerprint": fingerprint, "latent_errors": listed})

    def image_path(self, index: int) -> Path:
        """The PNG of image number `index`."""
        return self.folder / f"{index:05d}.png"

    def read_images(self, indices: Sequence[int] | range) -> NDArray[np.uint8]:
        """Images uint8 [N, H, W, 3] by their numbers."""
        pixels = []
        for index in indices:
            with Image.open(self.image_path(index)) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        return np.stack(pixels)

    def read_latents(self, shard: Shard) -> NDArray[np.float32]:
        """The reference's latents, FP32 [traced, T, C, h, w]."""
        from safetensors.numpy import load_file

        latents: NDArray[np.float32] = load_file(self._latents(shard))["latents"]
        return latents

    def read_errors(self, shards: Sequence[Shard]) -> NDArray[np.float64]:
        """Relative latent errors of all traced images, [traced, T]; [0, 0] where none is."""
        rows: list[list[float]] = []
        for shard in shards:
            if shard.traced:
                rows += json.loads(self._marker(shard).read_text(encoding="utf-8"))["latent_errors"]
        return np.asarray(rows, np.float64) if rows else np.zeros((0, 0))

    def _marker(self, shard: Shard) -> Path:
        return self.folder / f"shard-{shard.first:05d}.json"

    def _latents(self, shard: Shard) -> Path:
        return self.folder / f"shard-{shard.first:05d}.safetensors"
