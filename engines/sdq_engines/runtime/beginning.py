"""Where a run begins: from noise, from an image (img2img), or from an image and a mask (inpainting).

Follows diffusers' StableDiffusionPipeline, StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline, down to
the order in which each image's generator is drawn from: the image's latents, the noise, the masked image's latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdq_engines.backends.base import Arrays
from sdq_engines.errors import SdqError
from sdq_engines.package.schema import EXTRA_CHANNELS, SamplerInfo
from sdq_engines.runtime.noise import NoiseStream
from sdq_engines.runtime.sampler import SamplerTables

__all__ = [
    "Beginning",
    "Moments",
    "Original",
    "begin_from_noise",
    "begin_from_originals",
    "first_call",
]


_FLOW = "FlowMatch"
"""Part of the names of diffusers' schedulers for flow matching."""


@dataclass(frozen=True)
class Moments:
    """What the VAE's encoder says of one image: a normal distribution of latents, scaled as the denoiser sees them."""

    mean: np.ndarray
    """FP32 [C, h, w]."""
    std: np.ndarray
    """FP32 [C, h, w]."""

    def sample(self, stream: NoiseStream) -> np.ndarray:
        """One draw, FP32 [C, h, w]."""
        return self.mean + self.std * stream.normal(self.mean.shape)


@dataclass(frozen=True)
class Original:
    """The image that one image of the call starts from."""

    image: Moments
    mask: np.ndarray | None = None
    """FP32 [1, h, w], 1 where to paint; None for img2img."""
    masked: Moments | None = None
    """Of the image without what is to be painted; only where the denoiser takes it."""


@dataclass(frozen=True)
class Beginning:
    """The start of one batch's run."""

    call: int
    """The first model call."""
    latents: np.ndarray
    """FP32 [batch, C, h, w], ready for that call."""
    extra: Arrays = field(default_factory=dict)
    """Inputs of the denoiser that stay the same in every step."""
    blend: Callable[[int, np.ndarray], np.ndarray] | None = None
    """(model call just made, its latents) -> the latents to go on with."""


def first_call(sampler: SamplerInfo, strength: float) -> int:
    """The model call at which a run of this strength begins: diffusers' `get_timesteps`.

    Its pipelines for flow matching (Stable Diffusion 3) round up the steps that are made, the others round them down.

    Raises:
        SdqError: a strength outside of (0, 1], or one that leaves no step.
    """
    steps = sampler.num_inference_steps
    if not 0 < strength <= 1:
        raise SdqError(f"strength is {strength:g}; it is more than 0 and at most 1.", "1 repaints all, 0.3 a little.")
    kept = steps - int(steps - steps * strength) if _FLOW in sampler.scheduler else min(int(steps * strength), steps)
    if kept < 1:
        raise SdqError(
            f"strength {strength:g} of {steps} steps leaves no step to make.", f"Give {1 / steps:g} or more."
        )
    return (steps - kept) * sampler.order


def begin_from_noise(
    tables: SamplerTables, streams: Sequence[NoiseStream], shape: tuple[int, ...], grey: np.ndarray | None = None
) -> Beginning:
    """Text to image: noise at the sampler's first level.

    Args:
        tables: the sampler's.
        streams: each image's noise.
        shape: (C, h, w).
        grey: for an inpainting denoiser, the latents [C, h, w] of an image that is masked as a whole.
    """
    noise = np.stack([stream.normal(shape) for stream in streams])
    extra = {}
    if grey is not None:
        whole = np.concatenate([np.ones_like(grey[:1]), grey])
        extra[EXTRA_CHANNELS] = np.repeat(whole[None], len(noise), axis=0)
    return Beginning(0, noise * tables.init_noise_sigma[0], extra)


def begin_from_originals(
    tables: SamplerTables, call: int, strength: float, originals: Sequence[Original], streams: Sequence[NoiseStream]
) -> Beginning:
    """Image to image, and inpainting where the originals have masks.

    Args:
        tables: the sampler's.
        call: `first_call` of the strength.
        strength: at 1, inpainting begins from noise alone.
        originals: one for each image of the batch, all with a mask or none.
        streams: each image's noise.
    """
    fed, masked = originals[0].masked is not None, originals[0].mask is not None
    from_noise = masked and strength == 1
    pairs = list(zip(originals, streams, strict=True))
    # diffusers encodes the image, and so draws, only where it is needed
    clean = None if fed and from_noise else np.stack([each.image.sample(stream) for each, stream in pairs])
    noise = np.stack([stream.normal(each.image.mean.shape) for each, stream in pairs])
    latents = noise * tables.init_noise_sigma[0]
    if clean is not None and not from_noise:
        latents = _noised(tables, call, clean, noise)
    if not masked:
        return Beginning(call, latents)
    mask = np.stack([each.mask for each in originals if each.mask is not None])
    # diffusers draws for the masked image's latents whether or not the denoiser takes them
    hidden = np.stack([(each.masked or each.image).sample(stream) for each, stream in pairs])
    if fed:
        return Beginning(call, latents, {EXTRA_CHANNELS: np.concatenate([mask, hidden], axis=1)})
    assert clean is not None
    return Beginning(call, latents, blend=_blending(tables, mask, clean, noise))


def _noised(tables: SamplerTables, call: int, clean: np.ndarray, noise: np.ndarray) -> np.ndarray:
    keep, add = tables.noising[call]
    return keep * clean + add * noise


def _blending(
    tables: SamplerTables, mask: np.ndarray, clean: np.ndarray, noise: np.ndarray
) -> Callable[[int, np.ndarray], np.ndarray]:
    """Outside the mask, the original at the noise level of the next call; after the last one, the original itself."""

    def blend(call: int, latents: np.ndarray) -> np.ndarray:
        last = call + 1 == len(tables.noising)
        original = clean if last else _noised(tables, call + 1, clean, noise)
        return (1 - mask) * original + mask * latents

    return blend
