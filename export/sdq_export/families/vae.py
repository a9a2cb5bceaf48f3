"""Both ends of every pipeline: from the sampler's latents to pixels, and from pixels to the latents to start from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sdq_engines.package.layout import VAE_DECODER, VAE_ENCODER
from sdq_export.capture import FreeSize
from sdq_export.families.component import ComponentExport, RoundingCost
from sdq_export.sizes import HEIGHT, IMAGE_HEIGHT, IMAGE_WIDTH, WIDTH, different

__all__ = ["VaeDecoder", "VaeEncoder", "vae_decoder_export", "vae_encoder_export"]

_IMAGE_ERROR = "the root mean square error of an image by {weights}"
_IMAGE_LIMIT = 0.005
"""Of an image's range of one: 46 dB."""


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


def vae_decoder_export(shape: tuple[int, int, int], free_size: bool) -> ComponentExport:
    """The decoder: ``latents`` f32 [batch, C, h, w] as the sampler leaves them to ``images`` in [0, 1].

    Args:
        shape: C, h, w.
        free_size: whether height and width are left free.
    """
    return ComponentExport(
        name=VAE_DECODER,
        part="vae",
        module=VaeDecoder,
        inputs={"latents": torch.randn(2, shape[0], *different(shape[1:], int(free_size)))},
        outputs=("images",),
        rounding=RoundingCost("--vae", _IMAGE_ERROR, _IMAGE_LIMIT, _decoder_error),
        sized=FreeSize("latents", 1, (HEIGHT, WIDTH)) if free_size else None,
    )


def vae_encoder_export(image_size: tuple[int, int], multiple: int) -> ComponentExport:
    """The encoder: ``images`` f32 [batch, 3, H, W] in [-1, 1] to ``latent_moments`` f32 [batch, 2*C, h, w].

    Args:
        image_size: H, W.
        multiple: of a free height and width, the pixels of a latent; 0 for those of `image_size`.
    """
    return ComponentExport(
        name=VAE_ENCODER,
        part="vae",
        module=VaeEncoder,
        inputs={"images": torch.randn(2, 3, *different(image_size, multiple)).clamp(-1, 1)},
        outputs=("latent_moments",),
        rounding=RoundingCost("--vae", _IMAGE_ERROR, _IMAGE_LIMIT, _encoder_error),
        sized=FreeSize("images", multiple, (IMAGE_HEIGHT, IMAGE_WIDTH)) if multiple else None,
        compared=2,
    )


@torch.no_grad()
def _decoder_error(rounded: nn.Module, whole: nn.Module, latents: Tensor) -> tuple[float, dict[str, Any]]:
    """How far the images of latents [n, C, h, w] are from the unrounded decoder's."""
    return _image_error(rounded(latents), whole(latents))


@torch.no_grad()
def _encoder_error(rounded: nn.Module, whole: nn.Module, latents: Tensor) -> tuple[float, dict[str, Any]]:
    """The same of the images that the unrounded decoder makes of what is encoded: its own images of the latents."""
    decoder = VaeDecoder(whole.vae)
    images = 2 * decoder(latents) - 1
    found, wanted = (each(images).chunk(2, dim=1)[0] for each in (rounded, whole))
    return _image_error(decoder(found), decoder(wanted))


def _image_error(found: Tensor, wanted: Tensor) -> tuple[float, dict[str, Any]]:
    error = float((found - wanted).square().mean().sqrt())
    return error, {"psnr": -20 * math.log10(max(error, 1e-12))}
