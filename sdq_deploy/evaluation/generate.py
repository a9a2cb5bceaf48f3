"""Images by a denoiser in torch: the teacher, or a fake-quantized student, with the package's sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_deploy.training.guidance import guide, predict_outputs
from sdq_export.families.sd import encode_prompts
from sdq_export.sampler import SamplerPlan, run_sampler
from sdq_export.source import Source

__all__ = ["decode", "generate_images", "starting_noise"]


def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise that `torch.Generator("cpu").manual_seed(seed)` gives for each seed, FP32 [N, *shape]."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(s)) for s in seeds])


@torch.no_grad()
def decode(source: Source, latents: Tensor) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, 3] of latents [N, C, h, w], rounded as diffusers rounds."""
    images = source.vae.decode(latents / source.vae.config.scaling_factor).sample
    scaled = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    pixels: NDArray[np.uint8] = scaled.round().to(torch.uint8).cpu().numpy()
    return pixels


@torch.no_grad()
def generate_images(
    source: Source,
    denoiser: nn.Module,
    plan: SamplerPlan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    *,
    batch_size: int = 32,
    progress: Callable[[int], Any] = lambda count: None,
) -> NDArray[np.uint8]:
    """One image for each prompt and seed, with classifier-free guidance against the empty prompt.

    Args:
        source: brings the text encoder and the VAE.
        denoiser: called as (latents [2B, C, h, w], steps int64 [2B], text_embeddings [2B, L, D]).
        plan: the sampler; a deterministic one.
        prompts, seeds: N of each.
        guidance_scale: w in uncond + w (cond - uncond).
        progress: hears how many images were just finished.

    Returns:
        uint8 [N, H, W, 3].
    """
    config: Any = source.unet.config
    empty = encode_prompts(source, [""])
    images = []
    for first in range(0, len(prompts), batch_size):
        text = encode_prompts(source, list(prompts[first : first + batch_size]))

        def predict(model_input: Tensor, step: int, text: Tensor = text) -> Tensor:
            steps = torch.full((len(text),), step)
            return guide(predict_outputs(denoiser, model_input, steps, text, empty), guidance_scale)

        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = starting_noise(seeds[first : first + batch_size], shape)
        images.append(decode(source, run_sampler(plan, predict, noise)))
        progress(len(text))
    return np.concatenate(images)
