"""The drawn pictures that training reads: rendered once, kept on disk, mapped into memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdq_deploy.shapes64.render import render
from sdq_deploy.shapes64.scenes import IMAGE_SIZE, Split, sample_scene

__all__ = ["drawn_captions", "drawn_images"]

_CHUNK = 500


def drawn_images(folder: Path, count: int, split: Split = "train") -> npt.NDArray[np.uint8]:
    """Pictures 0..count-1 of a split, uint8 [count, 64, 64, 3], from a cache in `folder` that is drawn when missing."""
    path = folder / f"{split}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
        target = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        jobs = [(split, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
            for (_, start, stop), drawn in zip(jobs, pool.imap(_draw_range, jobs), strict=True):
                target[start:stop] = drawn
        target.flush()
        del target
        os.replace(partial, path)
    images: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return images


def _draw_range(job: tuple[Split, int, int]) -> npt.NDArray[np.uint8]:
    split, start, stop = job
    return np.stack([render(sample_scene(split, index)) for index in range(start, stop)])


def drawn_captions(folder: Path, count: int, split: Split = "train") -> list[str]:
    """The captions of pictures 0..count-1 of a split, cached beside them."""
    path = folder / f"{split}-{count}.json"
    if not path.exists():
        captions = [sample_scene(split, index).caption for index in range(count)]
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(captions), encoding="utf-8")
        os.replace(partial, path)
    loaded: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
