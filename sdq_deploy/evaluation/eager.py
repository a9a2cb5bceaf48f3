"""diffusers' own pipeline, eager FP32, timed as `bench` times a package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdq_engines.bench import PROMPT, Timing, measure
from sdq_engines.package.schema import Manifest

if TYPE_CHECKING:
    from sdq_export.source import Source

__all__ = ["time_eager"]


def time_eager(source: Source, manifest: Manifest, batch: int, runs: int) -> dict[str, Timing]:
    """Seconds of one denoiser call on 2 * batch latents ("denoiser") and of a whole call ("end_to_end").

    Args:
        source: the loaded model.
        manifest: its scheduler, steps and guidance scale are used.
        batch: images per call.
        runs: of each timing.
    """
    import torch

    from sdq_export.inpainting import with_extra
    from sdq_export.sampler import saved_scheduler

    family, denoiser = source.family, source.denoiser
    scheduler = saved_scheduler(manifest.sampler.scheduler, manifest.sampler.config)
    pipeline = source.pipeline(scheduler, family.inpainting_pipeline if manifest.io.extra_channels else None)
    latents = with_extra(denoiser, torch.randn(2 * batch, *manifest.io.latent_shape))
    prompts, timestep = family.encode_prompts(source, [PROMPT]).expand(2 * batch), torch.tensor(500.0)
    with torch.inference_mode():
        step = measure(lambda: family.predict(denoiser, latents, timestep, prompts), runs)
        whole = measure(lambda: _images(pipeline, manifest, batch), max(3, runs // 2), warm_up=1)
    return {"denoiser": step, "end_to_end": whole}


def _images(pipeline: Any, manifest: Manifest, batch: int) -> Any:
    import torch
    from PIL import Image

    sampler, size = manifest.sampler, manifest.io.image_size[::-1]
    painted = {"image": Image.new("RGB", size, "grey"), "mask_image": Image.new("L", size, 255), "strength": 1.0}
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
