"""Stable Diffusion 3: an MMDiT with adaptive normalization, flow matching, two CLIP text encoders and perhaps a T5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import CallDefaults
from sdq_export.conditioning import POOLED_INPUT, TEXT_INPUT
from sdq_export.families.base import Family
from sdq_export.families.checks import check_text_encoders, check_vae
from sdq_export.families.encoder import EncoderSpec
from sdq_export.families.mmdit import T5_INPUT, T5_TOKENS, MMDiT
from sdq_export.families.text import LastHiddenState, PenultimateAndPooled

__all__ = ["StableDiffusion3", "StableDiffusion3WithT5"]

_CLIPS = tuple(
    EncoderSpec(
        f"text_encoder{suffix}",
        f"tokenizer{suffix}",
        (TEXT_INPUT, POOLED_INPUT),
        PenultimateAndPooled,
        length_of="tokenizer",
    )
    for suffix in ("", "_2")
)


class StableDiffusion3(Family):
    """Stable Diffusion 3 without its third text encoder, which is optional: diffusers puts zeros in its place."""

    name = "stable-diffusion-3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    network = MMDiT()
    parts: ClassVar = {
        "transformer": "diffusers.SD3Transformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModelWithProjection",
        "tokenizer": "transformers.CLIPTokenizer",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "tokenizer_2": "transformers.CLIPTokenizer",
    }
    encoders = _CLIPS
    recipe = "sd3"
    default_steps, default_guidance = 28, 7.0
    call_defaults = CallDefaults(image_strength=0.6, inpaint_strength=0.6)

    @classmethod
    def fits(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        return super().fits(folder, index) and not _has_t5(folder, index)

    def check(self) -> None:
        config = self.checkpoint.skeleton.config
        check_text_encoders(self, config.pooled_projection_dim)
        check_vae(self)
        if config.pos_embed_max_size is None:
            raise SdqError(
                "The denoiser's pos_embed_max_size=None is not supported; Stable Diffusion 3 crops from one."
            )

        if config.in_channels != config.out_channels:
            raise SdqError(
                f"The denoiser takes {config.in_channels} channels and gives {config.out_channels}; "
                "inpainting variants of Stable Diffusion 3 are not supported."
            )

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"text_encoder_3": None, "tokenizer_3": None}


class StableDiffusion3WithT5(StableDiffusion3):
    """Stable Diffusion 3 with all three text encoders."""

    network = MMDiT(has_t5=True)
    parts: ClassVar = {
        **StableDiffusion3.parts,
        "text_encoder_3": "transformers.T5EncoderModel",
        "tokenizer_3": "transformers.T5TokenizerFast",
    }
    encoders = (
        *_CLIPS,
        EncoderSpec("text_encoder_3", "tokenizer_3", (T5_INPUT,), LastHiddenState, T5_TOKENS, clip=False),
    )

    @classmethod
    def fits(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        return index.get("_class_name") in cls.pipelines() and _has_t5(folder, index)

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {}

    @property
    def full_precision(self) -> tuple[str, ...]:
        return ("text_encoder_3",)


def _has_t5(folder: Path, index: Mapping[str, Any]) -> bool:
    """Whether the checkpoint names a third text encoder and brings it: it may be left out of a download."""
    named = index.get("text_encoder_3")
    return isinstance(named, list) and named[:1] not in ([], [None]) and (folder / "text_encoder_3").is_dir()
