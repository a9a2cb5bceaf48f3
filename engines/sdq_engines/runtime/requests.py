"""What a caller may ask of a package, and what it answers to the rest."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdq_engines.arguments import as_number, as_pair, as_plain, as_text, as_whole, as_wholes
from sdq_engines.errors import SdqError
from sdq_engines.guidance import Guidance, Text
from sdq_engines.package.schema import Manifest, Size
from sdq_engines.runtime.prompts import ImageSize
from sdq_engines.runtime.wording import Wording

__all__ = [
    "ImageRequest",
    "check_guidance",
    "check_originals",
    "check_sampler",
    "check_size",
    "plan_images",
    "refuse_others",
]

#: Arguments of diffusers' pipelines that a compiled package cannot honour, and why.
_REFUSED = {
    "guidance_rescale": "the guidance combination is compiled into the package without it",
    "eta": "the sampler's noise is compiled into the package",
    "timesteps": "the timesteps are compiled into the package",
    "sigmas": "the sigmas are compiled into the package",
    "clip_skip": "the text encoder's output layer is compiled into the package (export --clip-skip)",
    "max_sequence_length": "how many tokens of a prompt the model reads is compiled into the package",
    "denoising_start": "the timesteps are compiled into the package; `strength` says how many of them are made",
    "denoising_end": "the timesteps are compiled into the package, and all of them are made",
    "aesthetic_score": "Stable Diffusion XL's refiner alone takes it",
    "negative_aesthetic_score": "Stable Diffusion XL's refiner alone takes it",
    "skip_guidance_layers": "the guidance combination is compiled into the package without it",
    "skip_layer_guidance_scale": "the guidance combination is compiled into the package without it",
    "skip_layer_guidance_start": "the guidance combination is compiled into the package without it",
    "skip_layer_guidance_stop": "the guidance combination is compiled into the package without it",
    "joint_attention_kwargs": "attention is compiled into the package",
    "timestep_cond": "the timesteps are compiled into the package",
    "mu": "the timesteps are compiled into the package",
    "return_dict": "the result has both .images and .latents",
    "callback_steps": "use `callback`, which hears each step",
    "callback_on_step_end_tensor_inputs": "use `callback`, which hears each step",
    "negative_original_size": "both halves of guidance are told the same size",
    "negative_crops_coords_top_left": "both halves of guidance are told the same size",
    "negative_target_size": "both halves of guidance are told the same size",
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
    "output_type": "the result has PIL images in .images, and .latents",
    "callback_on_step_end": "use `callback`, which hears each step",
}

#: Of those, values that ask for nothing.
_NEUTRAL: dict[str, object] = {"guidance_rescale": 0, "eta": 0, "output_type": "pil", "return_dict": True}


@dataclass(frozen=True)
class ImageRequest:
    """One image to make."""

    prompt: Wording
    negative_prompt: Wording
    seed: int
    prompt_index: int = 0
    """Which prompt of the call it is."""

    def text(self, row: Text) -> Wording:
        """What one of its rows reads."""
        return self.negative_prompt if row == "negative" else self.prompt


def refuse_others(manifest: Manifest, arguments: dict[str, Any]) -> None:
    """Raises: SdqError: for the first argument given that the package cannot honour; None counts as not given, and so
    does what the package does anyway."""
    neutral = _NEUTRAL | {"clip_skip": max((text.clip_skip for text in manifest.text), default=0)}
    for name, value in arguments.items():
        plain = as_plain(value)
        if plain is None or (isinstance(plain, int | float | str) and plain == neutral.get(name)):
            continue
        if name not in _REFUSED:
            raise SdqError(f"There is no argument {name!r}.", "See help(sdq_engines.Pipeline.__call__).")
        raise SdqError(f"A package cannot honour {name}: {_REFUSED[name]}.", f"Leave {name} out.")


def check_sampler(manifest: Manifest, num_inference_steps: int | None, scheduler: str | None) -> None:
    """Raises: SdqError: other steps or another scheduler than the package's were asked for."""
    sampler = manifest.sampler
    has = f"This package was exported with {sampler.scheduler} at {sampler.num_inference_steps} steps"
    hint = (
        "Export another package: sdq-deploy export RUN --out PACKAGE, from a run with that scheduler and those steps."
    )
    steps = None if num_inference_steps is None else as_whole(num_inference_steps, "num_inference_steps")
    if steps is not None and steps != sampler.num_inference_steps:
        raise SdqError(f"{has}; {steps} steps were asked for.", hint)
    plain = sampler.scheduler.removesuffix("Scheduler").lower()
    asked = None if scheduler is None else as_text(scheduler, "scheduler")
    if asked is not None and asked.removesuffix("Scheduler").lower().replace("-", "") != plain:
        raise SdqError(f"{has}; the scheduler {asked} was asked for.", hint)


def check_size(
    takes_size: bool,
    size: Size,
    original_size: tuple[int, int] | None,
    crops_coords_top_left: tuple[int, int] | None,
    target_size: tuple[int, int] | None,
) -> ImageSize:
    """What the model is told of the image's size: by default an uncropped image of `size`, that which is made.

    Raises:
        SdqError: a size for a model that takes none, or one that is not two numbers.
    """
    given = {
        "original_size": original_size,
        "crops_coords_top_left": crops_coords_top_left,
        "target_size": target_size,
    }
    asked = {name: as_pair(value, name) for name, value in given.items() if value is not None}
    corner = asked.setdefault("crops_coords_top_left", (0, 0))
    if corner == (0, 0):
        asked.pop("crops_coords_top_left")
    if asked and not takes_size:
        raise SdqError(f"This package's model takes no {next(iter(asked))}.", "Stable Diffusion XL does.")
    return ImageSize(asked.get("original_size", size), corner, asked.get("target_size", size))


def check_guidance(manifest: Manifest, guidance_scale: float | None) -> Guidance:
    """How to guide: by the package's own scale where the caller names none.

    Raises:
        SdqError: it is not one number that is finite in FP32.
    """
    if guidance_scale is None:
        return Guidance.classifier_free(manifest.sampler.guidance_scale)
    return Guidance.classifier_free(as_number(guidance_scale, "guidance_scale"))


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
        return as_number(strength, "strength")
    return manifest.defaults.image_strength if mask_image is None else manifest.defaults.inpaint_strength


def plan_images(
    prompts: Sequence[Wording],
    negatives: Sequence[Wording],
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int,
) -> list[ImageRequest]:
    """One request per image, prompt by prompt.

    Image i of the call gets the i-th seed of a list, or `seed + i`: any image can be made again alone by its own seed.

    Args:
        prompts: of the call.
        negatives: one for each of them.
        seed: a whole number, or a row of as many as there are images.
        num_images_per_prompt: a whole number.

    Raises:
        SdqError: no prompt, or seeds that are none or whose number does not fit.
    """
    each = as_whole(num_images_per_prompt, "num_images_per_prompt")
    if not prompts:
        raise SdqError("prompt is an empty list, which makes no image.", "Give at least one prompt.")
    if each < 1:
        raise SdqError(f"num_images_per_prompt is {each}; a whole number from 1 on is wanted.", "Or leave it out.")
    owners = [index for index in range(len(prompts)) for _ in range(each)]
    return [
        ImageRequest(prompts[index], negatives[index], number, index)
        for index, number in zip(owners, _seeds(seed, len(owners)), strict=True)
    ]


def _seeds(seed: int | Sequence[int] | None, total: int) -> list[int]:
    read = secrets.randbits(32) if seed is None else as_wholes(seed, "seed")
    seeds = [read + i for i in range(total)] if isinstance(read, int) else read
    if len(seeds) != total:
        raise SdqError(f"{len(seeds)} seeds were given for {total} images.", "Give one seed, or one per image.")
    if outside := [number for number in seeds if not -(2**63) <= number < 2**64]:
        raise SdqError(
            f"{outside[0]} is no seed; seeds are from -2**63 to 2**64 - 1, as torch's.", "Give a smaller number."
        )
    return seeds
