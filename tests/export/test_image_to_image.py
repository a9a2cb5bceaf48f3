"""Runs that begin from an image, or an image and a mask, against diffusers' own pipelines with the same seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.guidance import Guidance
from sdq_export.engines import check_built_engine
from sdq_export.guidance import GuidedDenoiser
from sdq_export.sampler import compile_sampler, make_scheduler, run_sampler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser
from sdq_export.writer import export_package
from tests.export.conftest import GUIDANCE, OTHER_STEPS, plan_of
from tests.export.quantized import quantized_checkpoint
from tests.images import psnr

pytestmark = pytest.mark.slow

STEPS, PROMPTS, SEEDS = OTHER_STEPS, ["a red circle", "two blue stars"], [3, 4]
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


def by_diffusers(source: Source, scheduler: str | None, kind: str, **options: Any) -> Made:
    """Each image from its own generator; the checkpoint's own scheduler where none is named."""
    chosen = make_scheduler(scheduler, source.scheduler.config) if scheduler else copy.deepcopy(source.scheduler)
    pipeline = source.pipeline(chosen, kind)
    latents = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **options,
    ).images
    config = source.vae.config
    with torch.no_grad():
        scaled = latents / config.scaling_factor + (config.shift_factor or 0)
        decoded = source.vae.decode(scaled, return_dict=False)[0]
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


@pytest.fixture(scope="module", params=[*SCHEDULERS, "euler-ancestral"])
def scheduler(request: pytest.FixtureRequest) -> str:
    """Its package is made once, for all tests of this module that use it."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pipeline(source: Source, scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The FP32 package of a scheduler on onnxruntime."""
    out = tmp_path_factory.mktemp(scheduler) / "package"
    made = export_package(source, out, plan_of(source, scheduler, STEPS), GUIDANCE, PackageSettings(dtype="fp32"))
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


@pytest.mark.parametrize(
    ("masks", "strength"),
    [
        (None, 0.3),
        (None, 0.75),
        (None, None),
        ([mask(), mask().rotate(90)], 0.6),
        ([mask(), mask()], 1.0),
        ([mask(), mask()], None),
    ],
)
def test_other_families_start_from_images(
    other_family: tuple[Source, Pipeline], masks: list[Image.Image] | None, strength: float | None
) -> None:
    """Stable Diffusion 3 makes 3 of 8 steps at strength 0.3, the others 2; and its latents are shifted.

    Without a strength each takes its family's own.
    """
    source, pipeline = other_family
    options: dict[str, Any] = {"image": [picture(1), picture(2)]}
    options |= {"mask_image": masks} if masks else {}
    options |= {} if strength is None else {"strength": strength}
    stem = source.family.pipeline.removesuffix("Pipeline")
    wanted = by_diffusers(source, None, f"{stem}{'Inpaint' if masks else 'Img2Img'}Pipeline", **options)
    require_equal(ours(pipeline, **options), wanted)


def test_what_overflows_in_half_precision_stays_in_single(other_family: tuple[Source, Pipeline]) -> None:
    source, pipeline = other_family
    whole = {"vae_decoder", "vae_encoder"} if source.family.name == "stable-diffusion-xl" else set()
    assert set(pipeline.manifest.full_precision) == whole


@pytest.fixture(scope="module")
def inpainting_source(tiny: Callable[[str], Path]) -> Source:
    """A checkpoint in the layout of runwayml/stable-diffusion-inpainting."""
    return load_source(tiny("sd-inpainting"))


@pytest.fixture(scope="module", params=["dpmpp-2m", "euler-ancestral"])
def inpainting(
    request: pytest.FixtureRequest, inpainting_source: Source, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Pipeline]:
    """A scheduler and its FP32 package of nine channels on onnxruntime."""
    scheduler: str = request.param
    out, plan = tmp_path_factory.mktemp("nine") / "package", plan_of(inpainting_source, scheduler, STEPS)
    made = export_package(inpainting_source, out, plan, GUIDANCE, PackageSettings(dtype="fp32"))
    return scheduler, Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_with_a_nine_channel_denoiser(
    inpainting_source: Source, inpainting: tuple[str, Pipeline], strength: float
) -> None:
    scheduler, pipeline = inpainting
    images, masks = [picture(1), picture(2)], [mask(), mask().transpose(Image.Transpose.ROTATE_90)]
    options = {"image": images, "mask_image": masks, "strength": strength}
    wanted = by_diffusers(inpainting_source, scheduler, INPAINT, **options)
    require_equal(ours(pipeline, **options), wanted)
    assert relative(ours(pipeline, image=images, mask_image=masks[::-1], strength=strength), wanted) > 1e-3
    assert relative(ours(pipeline, image=images[::-1], mask_image=masks, strength=strength), wanted) > 1e-3


def test_the_inpainting_denoiser_of_stable_diffusion_xl(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_source(tiny("sdxl-inpainting"))
    plan = compile_sampler(source.scheduler, STEPS)
    made = export_package(source, tmp_path / "package", plan, GUIDANCE, PackageSettings(dtype="fp32"))
    pipeline = Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")
    assert (pipeline.manifest.io.latent_shape, pipeline.manifest.io.extra_channels) == ((4, 8, 8), 5)
    options = {"image": [picture(1), picture(2)], "mask_image": [mask(), mask()], "strength": 0.5}
    wanted = by_diffusers(source, None, "StableDiffusionXLInpaintPipeline", **options)
    require_equal(ours(pipeline, **options), wanted)


def test_an_inpainting_package_says_what_it_is_and_asks_for_a_mask(inpainting: tuple[str, Pipeline]) -> None:
    _, pipeline = inpainting
    assert pipeline.manifest.io.extra_channels == 5
    assert pipeline.manifest.io.latent_shape == (4, 8, 8)
    with pytest.raises(SdqError, match="needs a mask beside the image"):
        pipeline("a red circle", image=picture(1))


def test_text_to_image_with_an_inpainting_package_paints_the_whole_of_a_grey_image(
    inpainting_source: Source, inpainting: tuple[str, Pipeline]
) -> None:
    """As the torch denoiser does in training and evaluation, where no mask is given."""
    scheduler, pipeline = inpainting
    plan = plan_of(inpainting_source, scheduler, STEPS)
    denoiser = StepDenoiser(copy.deepcopy(inpainting_source.denoiser), torch.from_numpy(plan.timesteps)).eval()
    negative, prompt = (
        inpainting_source.family.encode_prompts(inpainting_source, [each]) for each in (None, PROMPTS[0])
    )
    guided = GuidedDenoiser(denoiser, Guidance.classifier_free(GUIDANCE), prompt, negative)
    generator = torch.Generator().manual_seed(SEEDS[0])
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    wanted = run_sampler(plan, guided, noise, generator=generator).numpy()
    found = pipeline(PROMPTS[0], seed=SEEDS[0], guidance_scale=GUIDANCE).latents
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-4


def test_a_quantized_inpainting_denoiser_passes_parity_and_compiles_for_every_engine(
    inpainting_source: Source, tmp_path: Path
) -> None:
    plan = plan_of(inpainting_source, "ddim", 3)
    checkpoint = quantized_checkpoint(inpainting_source, plan, "w4a8")
    result = export_package(inpainting_source, tmp_path / "package", plan, GUIDANCE, checkpoint=checkpoint)
    package = result.package
    for engine in ("onnxruntime", "openvino", "tensorrt-rtx"):
        package = build_engine(package, engine)
        package, _ = check_built_engine(package, engine, result)
    images = [
        Pipeline.from_package(package, engine)(PROMPTS[0], image=picture(1), mask_image=mask(), seed=3).latents
        for engine in ("onnxruntime", "openvino")
    ]
    assert np.linalg.norm(images[0] - images[1]) / np.linalg.norm(images[0]) < 0.2


def test_the_encoder_can_be_left_out_but_not_of_an_inpainting_package(
    source: Source, inpainting_source: Source, tmp_path: Path
) -> None:
    made = export_package(
        source, tmp_path / "without", plan_of(source, "ddim", 2), GUIDANCE, PackageSettings(vae_encoder=False)
    )
    assert "vae_encoder" not in made.package.manifest.components
    pipeline = Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")
    with pytest.raises(SdqError, match="has no VAE encoder") as refused:
        pipeline("a red circle", image=picture(1))
    assert "sdq-deploy export" in refused.value.hint
    plan = plan_of(inpainting_source, "ddim", 2)
    with pytest.raises(SdqError, match="inpainting model needs its VAE encoder"):
        export_package(inpainting_source, tmp_path / "nine", plan, GUIDANCE, PackageSettings(vae_encoder=False))
    assert not (tmp_path / "nine").exists()


def test_a_scheduler_of_second_order_begins_at_a_whole_step(source: Source, tmp_path: Path) -> None:
    """Heun makes two model calls a step; diffusers' strength counts steps."""
    scheduler = HeunDiscreteScheduler.from_config(source.scheduler.config)
    plan = compile_sampler(scheduler, 5)
    assert (plan.order, plan.calls) == (2, 9)
    made = export_package(source, tmp_path / "package", plan, GUIDANCE, PackageSettings(dtype="fp32", vae_encoder=True))
    pipeline = Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")
    wanted = source.pipeline(scheduler, IMAGE_TO_IMAGE)(
        PROMPTS[0], image=picture(1), strength=0.5, num_inference_steps=5, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images.numpy()  # fmt: skip
    heard: list[int] = []
    found = pipeline(
        PROMPTS[0], image=picture(1), strength=0.5, seed=3, callback=lambda event: heard.append(event.num_steps)
    ).latents
    assert heard == [3] * 3  # two of five steps, the last of which needs no second call
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-4
