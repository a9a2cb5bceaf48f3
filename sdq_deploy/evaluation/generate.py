"""Images by a denoiser in torch: the teacher, or a fake-quantized student, with the package's sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_engines.guidance import Guidance
from sdq_export.families.vae import VaeDecoder
from sdq_export.guidance import GuidedDenoiser
from sdq_export.sampler import SamplerPlan, run_sampler
from sdq_export.source import Source

__all__ = ["decode", "generate_images", "sample_latents"]


@torch.no_grad()
def sample_latents(
    source: Source,
    denoiser: nn.Module,
    plan: SamplerPlan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: Guidance,
    *,
    device: torch.device | str = "cpu",
    on_latents: Callable[[int, Tensor], Any] | None = None,
) -> Tensor:
    """Final latents of one batch, FP32 [N, C, h, w] on `device`.

    Each seed drives a CPU generator of its own, for the starting noise and for what a stochastic sampler adds.

    Args:
        source: brings the text encoders, which stay where they are.
        denoiser: on `device`; called as (latents [2N, C, h, w], steps int64 [2N], conditioning of 2N prompts).
        plan: the sampler.
        prompts, seeds: N of each.
        guidance: against the empty prompt.
        device: where to compute.
        on_latents: hears (step, latents) after each step.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    family = source.family
    shape = family.latent_shape
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    negative = family.encode_prompts([None]) if "negative" in guidance.texts else None
    guided = GuidedDenoiser(denoiser, guidance, family.encode_prompts(list(prompts)), negative)
    return run_sampler(plan, guided, noise, generator=generators, on_latents=on_latents)


@torch.no_grad()
def decode(source: Source, latents: Tensor) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, 3] of latents [N, C, h, w], rounded as diffusers rounds."""
    scaled = VaeDecoder(source.vae)(latents).permute(0, 2, 3, 1) * 255
    pixels: NDArray[np.uint8] = scaled.round().to(torch.uint8).cpu().numpy()
    return pixels


def generate_images(
    source: Source,
    denoiser: nn.Module,
    plan: SamplerPlan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: Guidance,
    *,
    batch_size: int = 32,
    progress: Callable[[int], Any] = lambda count: None,
) -> NDArray[np.uint8]:
    """One image for each prompt and seed, uint8 [N, H, W, 3]; see `sample_latents`.

    Args:
        source, denoiser, plan, prompts, seeds, guidance: as there.
        batch_size: images computed together.
        progress: hears how many images were just finished.
    """
    images = []
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        images.append(decode(source, sample_latents(source, denoiser, plan, prompts[part], seeds[part], guidance)))
        progress(len(images[-1]))
    return np.concatenate(images)
