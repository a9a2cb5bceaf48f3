"""The VAE's encoder as a graph: what a run from an image begins with."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_export.capture import FreeSize, capture
from sdq_export.sizes import IMAGE_HEIGHT, IMAGE_WIDTH, different

__all__ = ["VaeEncoder", "capture_vae_encoder"]


class VaeEncoder(nn.Module):
    """Mean and standard deviation of an image's latents, both scaled as the denoiser sees latents.

    The package's runtime draws the sample itself, from the seed's own noise.

    Args:
        vae: diffusers' AutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to [B, 2*C, h, w]: the mean's channels, then the standard deviation's."""
        distribution = self.vae.encode(images, return_dict=False)[0]
        scale = self.vae.config.scaling_factor
        return torch.cat([scale * distribution.mean, scale * distribution.std], dim=1)


def capture_vae_encoder(vae: nn.Module, image_size: tuple[int, int], free_size: bool = False) -> ir.Model:
    """The encoder: ``images`` f32 [batch, 3, H, W] in [-1, 1] to ``latent_moments`` f32 [batch, 2*C, h, w]."""
    config: Any = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    example = torch.randn(2, 3, *different(image_size, factor if free_size else 0)).clamp(-1, 1)
    sized = FreeSize("images", factor, (IMAGE_HEIGHT, IMAGE_WIDTH)) if free_size else None
    return capture(VaeEncoder(vae), {"images": example}, batched=["images"], output="latent_moments", sized=sized)
