"""The demo's images: the same prompts and seeds by the teacher, by each package, and by W4A8 without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdq_deploy.demo.report import Variant
from sdq_deploy.demo.state import Demo, Images
from sdq_deploy.demo.untrained import ALGORITHMS, quantize_without_training
from sdq_deploy.display.consoles import new_progress
from sdq_deploy.evaluation.generate import generate_images
from sdq_deploy.evaluation.metrics import compare_images
from sdq_deploy.shapes64 import CaptionSeed
from sdq_deploy.shapes64.classifier import caption_accuracy
from sdq_engines import Pipeline
from sdq_engines.guidance import Guidance
from sdq_engines.package.layout import DENOISER, PROLOGUE
from sdq_export.reference import build_reference
from sdq_export.sampler import SamplerPlan
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser

__all__ = ["package_images", "teacher_images", "untrained_images"]


def teacher_images(
    demo: Demo, source: Source, plan: SamplerPlan, guidance: float, pairs: Sequence[CaptionSeed]
) -> None:

    teacher = StepDenoiser(source.own(source.family.denoiser), torch.from_numpy(plan.timesteps)).eval()
    weights = sum(file.stat().st_size for file in (source.folder / source.family.denoiser).glob("*.safetensors"))
    images = _torch_images("floating point", source, teacher, plan, guidance, pairs)
    _add_variant(demo, "FP", "torch, FP32", images, pairs, denoiser_bytes=weights)


def _torch_images(
    name: str, source: Source, denoiser: Any, plan: SamplerPlan, guidance: float, pairs: Sequence[CaptionSeed]
) -> Images:

    with new_progress() as progress:
        task = progress.add_task(f"images, {name}", total=len(pairs))
        return generate_images(
            source,
            denoiser,
            plan,
            [pair.prompt for pair in pairs],
            [pair.seed for pair in pairs],
            Guidance.classifier_free(guidance),
            progress=lambda count: progress.advance(task, count),
        )


def package_images(demo: Demo, precision: str, folder: Path, pairs: Sequence[CaptionSeed]) -> None:
    """Images by the runtime that a user runs: no torch in it."""

    pipe = Pipeline.load(folder)
    with new_progress() as progress:
        batches = -(-len(pairs) // pipe.session.entry.profile.batch_max)
        task = progress.add_task(f"images, {precision}, {pipe.engine}", total=batches * pipe.manifest.sampler.num_calls)
        result = pipe(
            [pair.prompt for pair in pairs],
            seed=[pair.seed for pair in pairs],
            callback=lambda event: progress.advance(task),
        )
    images = np.stack([np.asarray(image) for image in result.images])
    files = pipe.manifest.files
    _add_variant(
        demo,
        f"{precision} trained",
        f"package, {pipe.engine}",
        images,
        pairs,
        denoiser_bytes=_bytes_of(files, DENOISER, PROLOGUE),
        package_bytes=pipe.manifest.bytes_without_engines,
    )


def _bytes_of(files: Mapping[str, Any], *components: str) -> int:
    return sum(entry.size for name, entry in files.items() if name.split("/")[0] in components)


def untrained_images(
    demo: Demo, source: Source, plan: SamplerPlan, guidance: float, pairs: Sequence[CaptionSeed]
) -> None:
    """W4A8 without training by every initialization we know, on the same sites; the best one stays in the table."""

    found: dict[str, Images] = {}
    for algorithm, title in ALGORITHMS.items():
        info, tensors = quantize_without_training(demo.settings.out / "run", algorithm)
        student = build_reference(
            source.for_spec(info.spec).own(source.family.denoiser), info.spec, tensors, torch.from_numpy(plan.timesteps)
        )
        found[title] = _torch_images(f"W4A8 untrained, {title}", source, student, plan, guidance, pairs)
    means = {title: float(compare_images(images, demo.images["FP"]).psnr.mean()) for title, images in found.items()}
    best = max(means, key=lambda title: means[title])
    _add_variant(demo, "W4A8 untrained", f"torch, fake quantization, {best}", found[best], pairs)
    listed = ", ".join(f"{title} {mean:.1f} dB" for title, mean in means.items())
    demo.notes.append(f"W4A8 without training, mean PSNR by initialization: {listed}; the table has the best, {best}.")


def _add_variant(
    demo: Demo,
    name: str,
    images_by: str,
    images: Images,
    pairs: Sequence[CaptionSeed],
    denoiser_bytes: int | None = None,
    package_bytes: int | None = None,
) -> None:

    demo.images[name] = images
    figures = {} if name == "FP" else compare_images(images, demo.images["FP"]).summary()
    figures.pop("identical", None)
    right = caption_accuracy(images, [pair.scene for pair in pairs])
    demo.variants.append(
        Variant(
            name=name,
            images_by=images_by,
            caption_accuracy=float(np.mean(right)),
            denoiser_bytes=denoiser_bytes,
            package_bytes=package_bytes,
            **figures,
        )
    )
