"""What integer weights of the text encoders and the VAE cost, against the unrounded FP32 component.

That the stored graph equals torch with the rounded weights is `parity.components`. Limits: docs/quantization.md,
"Parity".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdq_export.families.base import TextEncoder
from sdq_export.families.vae import VaeDecoder, VaeEncoder
from sdq_export.parity.report import Criterion
from sdq_export.source import Source
from sdq_export.storage import IntegerDtype

__all__ = ["rounded_text_encoder", "rounded_vae_decoder", "rounded_vae_encoder"]

_TEXT_LIMIT = 0.03
_IMAGE_LIMIT = 0.005
"""Of an image's range of one: 46 dB."""


@torch.no_grad()
def rounded_text_encoder(
    module: nn.Module, source: Source, encoder: TextEncoder, prompts: Sequence[str], dtype: IntegerDtype
) -> Criterion:
    """A text encoder of rounded weights: the error of its outputs over their distance from the empty prompt's.

    That distance is what guidance amplifies; the embeddings' own norm may be one large number that no prompt changes.

    Args:
        module: of the rounded weights, as `TextEncoder.wrap` makes it.
        source: has the unrounded ones.
        encoder: which it is.
        prompts: at least one that is not empty.
        dtype: how it was rounded.
    """
    tokens = encoder.token_ids(source, ["", *prompts])
    wanted = encoder.encode(source, ["", *prompts])
    errors = {}
    for (name, output), found in zip(wanted.items(), module(tokens), strict=True):
        told = output[1:] - output[:1]
        errors[name] = float((found - output)[1:].norm() / told.norm().clamp_min(1e-12))
    return Criterion(
        name=f"{encoder.component}_{dtype}",
        says=f"the error of the {encoder.component.replace('_', ' ')}'s {dtype.upper()} weights, "
        "over the distance of a prompt from the empty one,",
        limit=_TEXT_LIMIT,
        steps=(0,),
        per_step=(max(errors.values()),),
        details={"outputs": errors},
        hint=_hint("--text-encoder", dtype),
    )


@torch.no_grad()
def rounded_vae_decoder(decoder: nn.Module, source: Source, latents: Tensor, dtype: IntegerDtype) -> Criterion:
    """A decoder of rounded weights: how far its images of latents [n, C, h, w] are from the unrounded one's."""
    return _image_criterion("vae_decoder", decoder(latents), VaeDecoder(source.vae)(latents), dtype)


@torch.no_grad()
def rounded_vae_encoder(encoder: nn.Module, source: Source, latents: Tensor, dtype: IntegerDtype) -> Criterion:
    """An encoder of rounded weights: the same of the images that the unrounded decoder makes of what it encodes.

    Args:
        encoder: as `families.vae.VaeEncoder`.
        source: has the unrounded weights.
        latents: [n, C, h, w]; their images are encoded.
        dtype: how it was rounded.
    """
    decoder = VaeDecoder(source.vae)
    images = 2 * decoder(latents) - 1
    found, wanted = (each(images).chunk(2, dim=1)[0] for each in (encoder, VaeEncoder(source.vae)))
    return _image_criterion("vae_encoder", decoder(found), decoder(wanted), dtype)


def _image_criterion(component: str, found: Tensor, wanted: Tensor, dtype: IntegerDtype) -> Criterion:
    error = float((found - wanted).square().mean().sqrt())
    return Criterion(
        name=f"{component}_{dtype}",
        says=f"the root mean square error of an image by the {component.replace('_', ' ')}'s {dtype.upper()} weights",
        limit=_IMAGE_LIMIT,
        steps=(0,),
        per_step=(error,),
        details={"psnr": -20 * math.log10(max(error, 1e-12))},
        hint=_hint("--vae", dtype),
    )


def _hint(option: str, dtype: IntegerDtype) -> str:
    better = f"{option} int8, or leave it out for FP16" if dtype == "int4" else f"leave {option} out"
    return f"Keep more of it: {better}."
