"""Stable Diffusion 1 and 2: one CLIP text encoder, a UNet whose time path depends on the timestep alone, one VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.capture import FreeSize, capture
from sdq_export.denoiser import TEXT_INPUT
from sdq_export.sizes import HEIGHT, WIDTH, different, latent_multiple
from sdq_export.source import Source
from sdq_export.stepping import check_time_path

__all__ = [
    "FAMILY",
    "capture_denoiser",
    "capture_text_encoder",
    "capture_vae_decoder",
    "check_source",
    "encode_prompts",
    "latent_shape",
    "pixels_per_latent",
]

FAMILY = "stable-diffusion"

_TEXT_BATCH = 64
"""Prompts that go through the text encoder together."""


def check_source(source: Source) -> None:
    """Refuse what this family's graphs would compute wrongly.

    Raises:
        SdqError: naming the component and its setting.
    """
    check_time_path(source.unet)
    if getattr(source.text_encoder.config, "use_attention_mask", None):
        raise SdqError("The text encoder's use_attention_mask=True is not supported: packages encode padded prompts.")
    for setting in ("latents_mean", "latents_std", "shift_factor"):
        if source.vae.config.get(setting) is not None:
            raise SdqError(
                f"The VAE's {setting} is not supported; Stable Diffusion 1 and 2 have a scaling_factor alone."
            )


def latent_shape(source: Source) -> tuple[int, int, int]:
    """(C, h, w) of one image's latents at the checkpoint's own size."""
    config = source.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.out_channels), int(height), int(width)


def pixels_per_latent(source: Source) -> int:
    """How many pixels wide a latent pixel is: 8 for a VAE of four levels."""
    return int(2 ** (len(source.vae.config.block_out_channels) - 1))


def encode_prompts(source: Source, prompts: Sequence[str]) -> Tensor:
    """Text embeddings as diffusers' pipeline makes them, on the text encoder's device; float32 [n, L, D] on the CPU."""
    tokenizer, encoder = source.tokenizer, source.text_encoder
    parts = []
    with torch.no_grad():
        for first in range(0, len(prompts), _TEXT_BATCH):
            tokens = tokenizer(
                list(prompts[first : first + _TEXT_BATCH]),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            parts.append(encoder(tokens.input_ids.to(encoder.device), return_dict=False)[0].float().cpu())
    return torch.cat(parts)


def capture_denoiser(unet: nn.Module, shape: tuple[int, int, int], tokens: int, free_size: bool = False) -> ir.Model:
    """The UNet: ``sample`` f32 [2*batch, C, h, w], ``timestep`` f32 [], ``text_embeddings`` f32 [2*batch, L, D].

    C are the channels that it takes: for inpainting, the extra ones as well. With ``free_size`` h and w are symbols.
    """
    config: Any = unet.config
    multiple = latent_multiple(unet) if free_size else 0
    inputs = {
        "sample": torch.randn(2, config.in_channels, *different(shape[1:], multiple)),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.randn(2, tokens, config.cross_attention_dim),
    }
    model = capture(
        unet,
        inputs,
        batched=["sample", "encoder_hidden_states"],
        output="model_output",
        batch="2*batch",
        static={"return_dict": False},
        sized=FreeSize("sample", multiple, (HEIGHT, WIDTH)) if free_size else None,
    )
    # the forward's own argument name, which the exporter takes over
    next(value for value in model.graph.inputs if value.name == "encoder_hidden_states").name = TEXT_INPUT
    return model


def capture_text_encoder(text_encoder: nn.Module, tokens: int) -> ir.Model:
    """The text encoder: ``input_ids`` int64 [batch, L] to ``text_embeddings`` f32 [batch, L, D]."""
    example = torch.zeros(2, tokens, dtype=torch.int64)
    return capture(_TextEncoder(text_encoder), {"input_ids": example}, batched=["input_ids"], output=TEXT_INPUT)


def capture_vae_decoder(vae: nn.Module, shape: tuple[int, int, int], free_size: bool = False) -> ir.Model:
    """The decoder: ``latents`` f32 [batch, C, h, w] as the sampler leaves them to ``images`` in [0, 1]."""
    example = torch.randn(2, shape[0], *different(shape[1:], int(free_size)))
    sized = FreeSize("latents", 1, (HEIGHT, WIDTH)) if free_size else None
    return capture(_VaeDecoder(vae), {"latents": example}, batched=["latents"], output="images", sized=sized)


class _TextEncoder(nn.Module):
    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.text_encoder(input_ids, return_dict=False)[0]
        return embeddings


class _VaeDecoder(nn.Module):
    """Scaling, decoding and the image processor's denormalization, as the end of diffusers' pipeline."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)
