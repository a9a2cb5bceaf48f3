"""The end of every pipeline: from the sampler's latents to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.capture import capture

if TYPE_CHECKING:
    from sdq_export.source import Source

__all__ = ["VaeDecoder", "capture_vae_decoder", "check_vae"]


class VaeDecoder(nn.Module):
    """Scaling, decoding and the image processor's denormalization, as the end of diffusers' pipelines.

    Args:
        vae: diffusers' AutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [n, C, h, w] as the sampler leaves them to images [n, 3, H, W] in [0, 1]."""
        config = self.vae.config
        scaled = latents / config.scaling_factor
        if getattr(config, "shift_factor", None):
            scaled = scaled + config.shift_factor
        images: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)


def capture_vae_decoder(decoder: VaeDecoder, shape: tuple[int, int, int]) -> ir.Model:
    """The decoder's graph: ``latents`` f32 [batch, C, h, w] as the sampler leaves them to ``images`` in [0, 1]."""
    example = torch.randn(2, *shape)
    return capture(decoder, {"latents": example}, batched=["latents"], outputs=["images"])


def check_vae(source: Source) -> None:
    """Refuse latents that are normalized channel by channel.

    Raises:
        SdqError: naming the setting.
    """
    for setting in ("latents_mean", "latents_std"):
        if source.vae.config.get(setting) is not None:
            raise SdqError(
                f"The VAE's {setting} is not supported; latents with one scaling_factor (and shift_factor) are."
            )
