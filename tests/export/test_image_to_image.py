"""Runs that begin from an image, or an image and a mask, against diffusers' own pipelines with the same seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_export.sampler import make_scheduler
from sdq_export.source import Source
from sdq_export.writer import export_package
from tests.export.conftest import GUIDANCE, plan_of

STEPS, PROMPTS, SEEDS = 8, ["a red circle", "two blue stars"], [3, 4]
SCHEDULERS = ["ddim", "pndm", "euler", "dpmpp-2m"]
IMAGE_TO_IMAGE, INPAINT = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth coloured gradient with a bright square, (width, height) = `size`."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    made = Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)
    made.paste((250, 240, 20), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return made


def mask(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """White where to paint: a rectangle that is off the latents' grid."""
    made = Image.new("L", size, 0)
    made.paste(255, (19, 10, 53, 44))
    return made


@dataclass(frozen=True)
class Made:
    """What a pipeline made: latents [n, 4, h, w], and images [n, H, W, 3] in [0, 1], rounded to 8 bits."""

    latents: NDArray[np.float32]
    images: NDArray[np.float32]


def by_diffusers(source: Source, scheduler: str, kind: str, **options: Any) -> Made:
    """Each image from its own generator."""
    pipeline = source.pipeline(make_scheduler(scheduler, source.scheduler.config), kind)
    latents = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **options,
    ).images
    with torch.no_grad():
        decoded = source.vae.decode(latents / source.vae.config.scaling_factor, return_dict=False)[0]
    images = pipeline.image_processor.postprocess(decoded, output_type="np")
    return Made(latents.numpy(), np.round(images * 255) / 255)


def ours(pipeline: Pipeline, **options: Any) -> Made:
    result = pipeline(PROMPTS, seed=SEEDS, guidance_scale=GUIDANCE, **options)
    return Made(result.latents, np.stack([np.asarray(image, np.float32) / 255 for image in result.images]))


def require_equal(found: Made, wanted: Made) -> None:
    assert psnr(found.images, wanted.images) >= 50
    assert relative(found, wanted) < 1e-4


def relative(found: Made, wanted: Made) -> float:
    return float(np.linalg.norm(found.latents - wanted.latents) / np.linalg.norm(wanted.latents))


def psnr(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(-10 * np.log10(np.mean((found.astype(np.float64) - wanted) ** 2) + 1e-12))


@pytest.fixture(scope="module", params=[*SCHEDULERS, "euler-ancestral"])
def scheduler(request: pytest.FixtureRequest) -> str:
    """Its package is made once, for all tests of this module that use it."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pipeline(source: Source, scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The FP32 package of a scheduler on onnxruntime."""
    out = tmp_path_factory.mktemp(scheduler) / "package"
    made = export_package(source, out, plan_of(source, scheduler, STEPS), GUIDANCE, dtype="fp32")
    return Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image(source: Source, scheduler: str, pipeline: Pipeline, strength: float) -> None:
    images = [picture(1), picture(2)]
    wanted = by_diffusers(source, scheduler, IMAGE_TO_IMAGE, image=images, strength=strength)
    require_equal(ours(pipeline, image=images, strength=strength), wanted)
    # the image matters, even at strength 1, where it is nearly all noise
    assert relative(ours(pipeline, image=images[::-1], strength=strength), wanted) > 1e-3


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_with_a_four_channel_denoiser(
    source: Source, scheduler: str, pipeline: Pipeline, strength: float
) -> None:
    images, masks = [picture(1), picture(2)], [mask(), mask().transpose(Image.Transpose.ROTATE_90)]
    options = {"image": images, "mask_image": masks, "strength": strength}
    wanted = by_diffusers(source, scheduler, INPAINT, **options)
    require_equal(ours(pipeline, **options), wanted)
    assert relative(ours(pipeline, image=images, mask_image=masks[::-1], strength=strength), wanted) > 1e-3
