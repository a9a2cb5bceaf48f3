"""The demo's pictures: grids of its images, and of their differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdq_deploy.demo.report import Picture
from sdq_deploy.demo.state import Demo, Images
from sdq_deploy.evaluation.grids import comparison_grid
from sdq_deploy.evaluation.metrics import compare_images
from sdq_deploy.shapes64 import CaptionSeed
from sdq_engines.files import atomic_write

__all__ = ["draw_pictures"]

_GRID_COLUMNS = 8


def draw_pictures(demo: Demo, folder: Path, pairs: Sequence[CaptionSeed]) -> list[Picture]:
    """Grids of the first prompts, of those where W4A8 is farthest from FP, and of the differences there."""
    reference = demo.images["FP"]
    order = ["FP", "W8A8 trained", "W4A8 trained", "W4A8 untrained"]
    worst = np.argsort(compare_images(demo.images["W4A8 trained"], reference).psnr)[:_GRID_COLUMNS]
    first = np.arange(min(_GRID_COLUMNS, len(pairs)))
    pictures = []
    for name, title, chosen in (
        ("first", "Same prompts, same seeds", first),
        ("worst", "Where W4A8 trained is farthest from FP", worst),
    ):
        rows = {key.replace(" ", "\n"): demo.images[key][chosen] for key in order}
        _save(comparison_grid(rows), folder / f"{name}.png")
        captions = "; ".join(f"{column + 1}: {pairs[index].prompt}" for column, index in enumerate(chosen))
        pictures.append(Picture(file=f"images/{name}.png", title=title, text=captions))
    differences = {
        key.replace(" ", "\n"): _amplified(demo.images[key][worst], reference[worst]) for key in order if key != "FP"
    }
    _save(comparison_grid(differences), folder / "worst-difference.png")
    pictures.append(
        Picture(
            file="images/worst-difference.png",
            title="The difference there, eight times amplified",
            text="Gray is no difference. The columns are those of the picture above.",
        )
    )
    return pictures


def _amplified(images: Images, reference: Images) -> Images:
    difference = images.astype(np.int16) - reference.astype(np.int16)
    return np.clip(128 + 8 * difference, 0, 255).astype(np.uint8)


def _save(picture: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
