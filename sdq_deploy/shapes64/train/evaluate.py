"""Does the model draw what the caption says? Images of caption-seed pairs, read by the classifier."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from sdq_deploy.shapes64.classifier import caption_accuracy, load_classifier
from sdq_deploy.shapes64.render import render
from sdq_deploy.shapes64.scenes import sample_scene
from sdq_deploy.shapes64.splits import CaptionSeed

__all__ = ["classifier_accuracy", "contact_sheet", "evaluate", "generate"]


def generate(
    pipeline: StableDiffusionPipeline,
    pairs: Sequence[CaptionSeed],
    guidance_scale: float,
    steps: int = 20,
    batch: int = 64,
) -> npt.NDArray[np.uint8]:
    """One image for each pair, uint8 [N, 64, 64, 3]; each seed drives a CPU generator of its own."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(pair.seed) for pair in part]
        output = pipeline(
            [pair.prompt for pair in part],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        )
        images.append(np.rint(output.images * 255).astype(np.uint8))
    return np.concatenate(images)


def evaluate(
    pipeline: StableDiffusionPipeline, classifier: Path, pairs: Sequence[CaptionSeed], guidance_scale: float, steps: int
) -> dict[str, Any]:
    """Fractions of the pairs in which every shape and colour is right, in all and by number of shapes."""
    started = time.monotonic()
    images = generate(pipeline, pairs, guidance_scale, steps)
    right = caption_accuracy(images, [pair.scene for pair in pairs], load_classifier(classifier))
    count = np.asarray([len(pair.scene.objects) for pair in pairs])
    return {
        "pairs": len(pairs),
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "accuracy": float(right.mean()),
        "accuracy_by_shapes": {str(n): float(right[count == n].mean()) for n in (1, 2, 3) if (count == n).any()},
        "pairs_by_shapes": {str(n): int((count == n).sum()) for n in (1, 2, 3)},
        "classifier_accuracy": classifier_accuracy(classifier),
        "seconds": round(time.monotonic() - started, 1),
    }


def classifier_accuracy(classifier: Path, count: int = 2000) -> float:
    """The classifier's own exact-set accuracy on freshly drawn held-out scenes."""
    scenes = [sample_scene("held_out", 100_000 + index) for index in range(count)]
    images = np.stack([render(scene) for scene in scenes])
    return float(caption_accuracy(images, scenes, load_classifier(classifier)).mean())


def contact_sheet(images: npt.NDArray[np.uint8], captions: Sequence[str], path: Path, columns: int = 8) -> None:
    """A PNG of the images, enlarged twice, each over its caption."""
    side, text, gap = 128, 46, 10
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap + index % columns * (side + gap), gap + index // columns * (side + text)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        draw.multiline_text((left, top + side + 2), _wrap(caption), fill="black", font_size=9, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _wrap(caption: str, width: int = 29) -> str:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def write_report(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
