"""Which images the page shows: the worst of every candidate, and the first ones, which nobody chose."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdq_deploy.evaluation.prompts import PromptSet
from sdq_deploy.evaluation.scoring import Scores
from sdq_deploy.evaluation.store import ImageStore
from sdq_deploy.pages.render import data_uri

__all__ = ["choose_cases", "describe_cases", "image_uri"]

_FIRST = 8
#: Longer sides are scaled down and stored as JPEG, or a page of 512 x 512 images would be some hundred megabytes.
_LARGEST_SIDE = 256
#: Numbers of the catalogue that are shown under an image, and their digits.
_SHOWN = {"psnr": 1, "ssim": 3, "lpips": 3}


def choose_cases(psnr: Mapping[str, NDArray[np.float64]], count: int) -> list[int]:
    """Numbers of about `count` images: the worst of each candidate in equal shares, and the first eight."""
    share = max(1, count // max(len(psnr), 1))
    worst = {int(number) for values in psnr.values() for number in np.argsort(values, kind="stable")[:share]}
    total = min(len(values) for values in psnr.values())
    return sorted(worst | set(range(min(_FIRST, total))))


def describe_cases(
    cases: Sequence[int],
    prompts: PromptSet,
    stores: Mapping[str, ImageStore],
    scores: Mapping[str, Scores],
) -> list[dict[str, Any]]:
    """What the page's script needs of each case, as plain data; images are inside it.

    Args:
        cases: numbers of images.
        prompts: their prompts and seeds.
        stores: name -> images, in the order of columns, the reference first.
        scores: name -> values of every image.
    """
    return [
        {
            "number": number,
            "prompt": prompts.prompts[number],
            "seed": prompts.seeds[number],
            "first": number < _FIRST,
            "images": [
                {
                    "name": name,
                    "source": image_uri(store.read_images([number])[0]),
                    "psnr": _value(scores[name], "psnr", number),
                    "text": _text(scores[name], number),
                }
                for name, store in stores.items()
            ],
        }
        for number in cases
    ]


def image_uri(image: NDArray[np.uint8]) -> str:
    """An image uint8 [H, W, 3] as an address: a small one exactly, a large one scaled down."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= _LARGEST_SIDE:
        picture.save(buffer, format="PNG", optimize=True)
        return data_uri(buffer.getvalue())
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    picture.save(buffer, format="JPEG", quality=90)
    return data_uri(buffer.getvalue(), "image/jpeg")


def _value(scores: Scores, metric: str, number: int) -> float | None:
    return float(scores.values[metric][number]) if metric in scores.values else None


def _text(scores: Scores, number: int) -> str:
    parts = []
    for metric, digits in _SHOWN.items():
        value = _value(scores, metric, number)
        if value is not None:
            parts.append(f"{metric.upper()} {value:.{digits}f}" + (" dB" if metric == "psnr" else ""))
    right = _value(scores, "caption_accuracy", number)
    if right is not None:
        parts.append("caption right" if right else "caption wrong")
    return " · ".join(parts)
