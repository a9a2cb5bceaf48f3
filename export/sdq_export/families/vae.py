"""Both ends of every pipeline: from the sampler's latents to pixels, and from pixels to the latents to start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.capture import FreeSize, capture
from sdq_export.sizes import HEIGHT, IMAGE_HEIGHT, IMAGE_WIDTH, WIDTH, different

if TYPE_CHECKING:
    from sdq_export.source import Source

__all__ = ["VaeDecoder", "VaeEncoder", "capture_vae_decoder", "capture_vae_encoder", "check_vae"]


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


class VaeEncoder(nn.Module):
    """Mean and standard deviation of an image's latents, both scaled (the mean shifted) as the denoiser sees latents.

    The package's runtime draws the sample itself, from the seed's own noise.

    Args:
        vae: diffusers' AutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] in [-1, 1] to [n, 2*C, h, w]: the mean's channels, then the standard deviation's."""
        config = self.vae.config
        distribution = self.vae.encode(images, return_dict=False)[0]
        mean = distribution.mean
        if getattr(config, "shift_factor", None):
            mean = mean - config.shift_factor
        return torch.cat([config.scaling_factor * mean, config.scaling_factor * distribution.std], dim=1)


def capture_vae_decoder(decoder: VaeDecoder, shape: tuple[int, int, int], free_size: bool = False) -> ir.Model:
    """The decoder's graph: ``latents`` f32 [batch, C, h, w] as the sampler leaves them to ``images`` in [0, 1]."""
    example = torch.randn(2, shape[0], *different(shape[1:], int(free_size)))
    sized = FreeSize("latents", 1, (HEIGHT, WIDTH)) if free_size else None
    return capture(decoder, {"latents": example}, batched=["latents"], outputs=["images"], sized=sized)


def capture_vae_encoder(encoder: VaeEncoder, image_size: tuple[int, int], multiple: int = 0) -> ir.Model:
    """The encoder's graph: ``images`` f32 [batch, 3, H, W] in [-1, 1] to ``latent_moments`` f32 [batch, 2*C, h, w].

    Args:
        encoder: what is captured.
        image_size: H, W.
        multiple: of a free height and width, the pixels of a latent; 0 for those of `image_size`.
    """
    example = torch.randn(2, 3, *different(image_size, multiple)).clamp(-1, 1)
    sized = FreeSize("images", multiple, (IMAGE_HEIGHT, IMAGE_WIDTH)) if multiple else None
    return capture(encoder, {"images": example}, batched=["images"], outputs=["latent_moments"], sized=sized)


def check_vae(source: Source) -> None:
    """Refuse latents that are normalized channel by channel, or that are not the denoiser's.

    Raises:
        SdqError: naming the setting.
    """
    channels = source.family.latent_shape(source)[0]
    if source.vae.config.latent_channels != channels:
        raise SdqError(
            f"The vae of {source.model} has latents of {source.vae.config.latent_channels} channels, the "
            f"{source.family.denoiser} of {channels}.",
            "Take both from one model.",
        )
    for setting in ("latents_mean", "latents_std"):
        if source.vae.config.get(setting) is not None:
            raise SdqError(
                f"The VAE's {setting} is not supported; latents with one scaling_factor (and shift_factor) are."
            )
