"""What a checkpoint of any family must keep to: parts that belong together."""

from __future__ import annotations

from typing import Any

from sdq_engines.errors import SdqError
from sdq_export.conditioning import TEXT_INPUT
from sdq_export.families.base import Family
from sdq_export.loading import naming

__all__ = ["check_text_encoders", "check_vae"]


def check_text_encoders(family: Family, width: Any) -> None:
    """Refuse tokenizers and text encoders that do not belong together, or that cannot encode the empty prompt.

    Args:
        family: of the checkpoint.
        width: of the CLIP encoders' embeddings side by side, as the denoiser takes them; a list is left to diffusers.

    Raises:
        SdqError: a tokenizer has more tokens than its encoder has embeddings, the lengths of prompts differ, an
            encoder fails by settings that transformers takes and cannot compute with, or is not the denoiser's.
    """
    checkpoint, lengths, widths = family.checkpoint, {}, 0
    for encoder in family.text_encoders:
        tokenizer, model = checkpoint.part(encoder.tokenizer), checkpoint.part(encoder.component)
        if len(tokenizer) > model.config.vocab_size:
            raise SdqError(
                f"The {encoder.tokenizer} of {checkpoint.model} has {len(tokenizer)} tokens, the {encoder.component} "
                f"embeddings of {model.config.vocab_size}.",
                "Save both from one pipeline, for example after its load_textual_inversion.",
            )
        lengths[encoder.spec.outputs[0], encoder.length] = encoder.tokenizer
        if encoder.spec.max_length is None:  # a T5 of billions of parameters is not run for it
            with naming(f"The {encoder.component} of {checkpoint.model}"):
                widths += encoder.encode([""])[TEXT_INPUT].shape[-1]
    if len(lengths) > len({output for output, _ in lengths}):
        said = ", ".join(f"{name} {length}" for (_, length), name in lengths.items())
        raise SdqError(
            f"The tokenizers of {checkpoint.model} pad prompts to different lengths ({said}), and their embeddings are "
            "joined side by side.",
            "Set model_max_length in their tokenizer_config.json to one number.",
        )
    if isinstance(width, int) and widths != width:
        raise SdqError(
            f"The text encoders of {checkpoint.model} give embeddings of {widths} channels; the {family.denoiser} "
            f"takes {width}.",
            "Take all of them from one model.",
        )


def check_vae(family: Family) -> None:
    """Refuse latents that are normalized channel by channel, or that are not the denoiser's.

    Raises:
        SdqError: naming the setting.
    """
    checkpoint, channels = family.checkpoint, family.latent_shape[0]
    if checkpoint.vae.config.latent_channels != channels:
        raise SdqError(
            f"The vae of {checkpoint.model} has latents of {checkpoint.vae.config.latent_channels} channels, the "
            f"{family.denoiser} of {channels}.",
            "Take both from one model.",
        )
    for setting in ("latents_mean", "latents_std"):
        if checkpoint.vae.config.get(setting) is not None:
            raise SdqError(
                f"The VAE's {setting} is not supported; latents with one scaling_factor (and shift_factor) are."
            )
