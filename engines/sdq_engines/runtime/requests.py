"""What a caller may ask of a package, and what it answers to the rest."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import Manifest, Size
from sdq_engines.runtime.prompts import ImageSize

__all__ = ["ImageRequest", "check_originals", "check_sampler", "check_size", "plan_images", "refuse_others"]

_IMAGE_STRENGTH, _INPAINT_STRENGTH = 0.8, 1.0
"""diffusers' own for Stable Diffusion, where the caller names none."""

#: Arguments of diffusers' pipelines that a compiled package cannot honour, and why.
_REFUSED = {
    "guidance_rescale": "the guidance combination is compiled into the package without it",
    "eta": "the sampler's noise is compiled into the package",
    "timesteps": "the timesteps are compiled into the package",
    "sigmas": "the sigmas are compiled into the package",
    "clip_skip": "the text encoder's output layer is compiled into the package",
    "negative_original_size": "both halves of guidance are told the same size",
    "negative_crops_coords_top_left": "both halves of guidance are told the same size",
    "negative_target_size": "both halves of guidance are told the same size",
    "prompt_2": "all text encoders read the same prompt",
    "negative_prompt_2": "all text encoders read the same prompt",
    "pooled_prompt_embeds": "the package encodes prompts itself",
    "negative_pooled_prompt_embeds": "the package encodes prompts itself",
    "cross_attention_kwargs": "attention is compiled into the package",
    "padding_mask_crop": "the whole image goes through the model; crop it before",
    "masked_image_latents": "the package encodes images itself",
    "ip_adapter_image": "the package holds no image adapter",
    "ip_adapter_image_embeds": "the package holds no image adapter",
    "prompt_embeds": "the package encodes prompts itself",
    "negative_prompt_embeds": "the package encodes prompts itself",
    "generator": "noise comes from `seed`, which equals torch.Generator('cpu').manual_seed(seed)",
    "latents": "the starting latents come from `seed`",
    "output_type": "the result has both .images and .latents",
    "callback_on_step_end": "use `callback`, which hears each step",
}


@dataclass(frozen=True)
class ImageRequest:
    """One image to make."""

    prompt: str
    negative_prompt: str | None
    seed: int
    prompt_index: int = 0
    """Which prompt of the call it is."""


def refuse_others(arguments: dict[str, Any]) -> None:
    """Raises: SdqError: for the first argument given that the package cannot honour; None counts as not given."""
    for name, value in arguments.items():
        if value is None:
            continue
        if name not in _REFUSED:
            raise SdqError(f"There is no argument {name!r}.", "See help(sdq_engines.Pipeline.__call__).")
        raise SdqError(f"A package cannot honour {name}: {_REFUSED[name]}.")


def check_sampler(manifest: Manifest, num_inference_steps: int | None, scheduler: str | None) -> None:
    """Raises: SdqError: other steps or another scheduler than the package's were asked for."""
    sampler = manifest.sampler
    has = f"This package was exported with {sampler.scheduler} at {sampler.num_inference_steps} steps"
    hint = (
        "Export another package: sdq-deploy export RUN --out PACKAGE, from a run with that scheduler and those steps."
    )
    if num_inference_steps is not None and num_inference_steps != sampler.num_inference_steps:
        raise SdqError(f"{has}; {num_inference_steps} steps were asked for.", hint)
    plain = sampler.scheduler.removesuffix("Scheduler").lower()
    if scheduler is not None and scheduler.removesuffix("Scheduler").lower().replace("-", "") != plain:
        raise SdqError(f"{has}; the scheduler {scheduler} was asked for.", hint)


def check_size(
    takes_size: bool,
    size: Size,
    original_size: tuple[int, int] | None,
    crops_coords_top_left: tuple[int, int],
    target_size: tuple[int, int] | None,
) -> ImageSize:
    """What the model is told of the image's size: by default an uncropped image of `size`, that which is made.

    Raises:
        SdqError: a size for a model that takes none, or one that is not two numbers.
    """
    asked = {"original_size": original_size, "target_size": target_size}
    asked |= {"crops_coords_top_left": None if tuple(crops_coords_top_left) == (0, 0) else crops_coords_top_left}
    for name, value in asked.items():
        if value is None:
            continue
        if not takes_size:
            raise SdqError(f"This package's model takes no {name}.", "Stable Diffusion XL does.")
        if len(value) != 2:
            raise SdqError(f"{name}={value!r} is not two numbers.", "Give (height, width), or (top, left) of a crop.")
    return ImageSize(original_size or size, crops_coords_top_left, target_size or size)


def check_originals(manifest: Manifest, image: object, mask_image: object, strength: float | None) -> float | None:
    """The strength of a run that begins from an image; None for text to image.

    Raises:
        SdqError: arguments that do not go together, or not with this package.
    """
    if image is None:
        if mask_image is not None or strength is not None:
            given = "mask_image" if mask_image is not None else "strength"
            raise SdqError(f"{given} was given without an image.", "Give image= as well, or leave it out.")
        return None
    if mask_image is None and manifest.io.extra_channels:
        raise SdqError(
            "This package's denoiser is an inpainting one: it needs a mask beside the image.",
            "Give mask_image=, white where to paint (--mask FILE); an all-white one repaints everything.",
        )
    if strength is not None:
        return float(strength)
    return _IMAGE_STRENGTH if mask_image is None else _INPAINT_STRENGTH


def plan_images(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int,
) -> list[ImageRequest]:
    """One request per image, prompt by prompt.

    Image i of the call gets the i-th seed of a list, or `seed + i`: any image can be made again alone by its own seed.

    Raises:
        SdqError: no prompt, or lists whose lengths do not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or num_images_per_prompt < 1:
        raise SdqError(
            f"{len(prompts)} prompts with {num_images_per_prompt} images each make no image.", "Give a prompt."
        )
    negatives = _negatives(negative_prompt, len(prompts))
    total = len(prompts) * num_images_per_prompt
    seeds = _seeds(seed, total)
    owners = [index for index in range(len(prompts)) for _ in range(num_images_per_prompt)]
    return [
        ImageRequest(prompts[index], negatives[index], number, index)
        for index, number in zip(owners, seeds, strict=True)
    ]


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str | None]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise SdqError(
            f"{len(negative_prompt)} negative prompts were given for {count} prompts.", "Give one, or one each."
        )
    return list(negative_prompt)


def _seeds(seed: int | Sequence[int] | None, total: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(32)
    seeds = [seed + i for i in range(total)] if isinstance(seed, int) else list(seed)
    if len(seeds) != total:
        raise SdqError(f"{len(seeds)} seeds were given for {total} images.", "Give one seed, or one per image.")
    if outside := [number for number in seeds if not -(2**63) <= number < 2**64]:
        raise SdqError(f"{outside[0]} is no seed; seeds are from -2**63 to 2**64 - 1, as torch's.")
    return seeds
