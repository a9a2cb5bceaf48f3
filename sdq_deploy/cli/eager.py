"""diffusers' own pipeline, eager FP32, timed as `bench` times a package."""

from __future__ import annotations

from typing import Any

from sdq_deploy.models import resolve_model
from sdq_engines.bench import PROMPT, Timing, measure
from sdq_engines.package.schema import Manifest

__all__ = ["time_eager"]


def time_eager(model: str, manifest: Manifest, batch: int, runs: int) -> dict[str, Timing]:
    """Seconds of one denoiser call on 2 * batch latents ("denoiser") and of a whole call ("end_to_end").

    Args:
        model: folder, hub id or shapes-64.
        manifest: its scheduler, steps and guidance scale are used.
        batch: images per call.
        runs: of each timing.
    """
    import torch

    from sdq_export.inpainting import with_extra

    pipeline = _pipeline(model, manifest)
    unet = pipeline.unet
    latents = with_extra(unet, torch.randn(2 * batch, *manifest.io.latent_shape))
    text = torch.randn(2 * batch, manifest.text[0].max_length, unet.config.cross_attention_dim)
    with torch.inference_mode():
        step = measure(lambda: unet(latents, 500, encoder_hidden_states=text), runs)
        whole = measure(lambda: _images(pipeline, manifest, batch), max(3, runs // 2), warm_up=1)
    return {"denoiser": step, "end_to_end": whole}


def _pipeline(model: str, manifest: Manifest) -> Any:
    import diffusers

    from sdq_export.source import load_source

    source = load_source(resolve_model(model))
    scheduler = getattr(diffusers, manifest.sampler.scheduler).from_config(manifest.sampler.config)
    inpainting = "StableDiffusionInpaintPipeline" if manifest.io.extra_channels else "StableDiffusionPipeline"
    return source.pipeline(scheduler, inpainting)


def _images(pipeline: Any, manifest: Manifest, batch: int) -> Any:
    import torch
    from PIL import Image

    sampler, size = manifest.sampler, manifest.io.image_size[::-1]
    painted = {"image": Image.new("RGB", size, "grey"), "mask_image": Image.new("L", size, 255)}
    return pipeline(
        PROMPT,
        num_images_per_prompt=batch,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        height=manifest.io.image_size[0],
        width=manifest.io.image_size[1],
        generator=[torch.Generator().manual_seed(i) for i in range(batch)],
        **(painted if manifest.io.extra_channels else {}),
    )
