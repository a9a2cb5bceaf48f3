"""Compiled samplers against diffusers' whole pipelines, text to image and image to image, on the tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdq_export.sampler import SamplerPlan, compile_sampler, make_scheduler, run_sampler
from sdq_export.source import Source

STEPS, GUIDANCE, PROMPT = 5, 4.0, "a red circle"
# the flow-matching model output is no Stable Diffusion UNet's; tests/export/test_sampler.py has that scheduler's loop
NAMES = ["ddim", "pndm", "euler", "euler-ancestral", "dpmpp-2m", "lcm"]


def ours(source: Source, plan: SamplerPlan, **options: Any) -> Tensor:
    """The compiled sampler around the denoiser itself; all noise is of one generator, as diffusers'."""
    generator = torch.Generator().manual_seed(7)
    prompts = source.family.encode_prompts(["", PROMPT])

    def predict(sample: Tensor, step: int) -> Tensor:
        timestep = torch.tensor(plan.timesteps[step])
        uncond, cond = source.family.network.predict(source.denoiser, torch.cat([sample] * 2), timestep, prompts).chunk(
            2
        )
        return uncond + GUIDANCE * (cond - uncond)

    noise = torch.randn(1, *source.family.latent_shape, generator=generator)
    with torch.no_grad():
        return run_sampler(plan, predict, noise, generator=generator, **options)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", NAMES)
def test_text_to_image_latents(source: Source, name: str) -> None:
    scheduler = make_scheduler(name, source.scheduler.config)
    wanted = source.pipeline(scheduler)(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    assert relative(ours(source, compile_sampler(scheduler, STEPS)), wanted) <= 1e-4


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmpp-2m", "euler"])
def test_image_to_image_latents(source: Source, name: str) -> None:
    scheduler = make_scheduler(name, source.scheduler.config)
    clean = torch.randn(1, *source.family.latent_shape, generator=torch.Generator().manual_seed(9))
    wanted = source.pipeline(scheduler, "StableDiffusionImg2ImgPipeline")(
        PROMPT,
        image=clean,
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    start = STEPS - int(STEPS * 0.6)
    found = ours(source, compile_sampler(scheduler, STEPS), start=start, clean_latents=clean)
    assert relative(found, wanted) <= 1e-4
