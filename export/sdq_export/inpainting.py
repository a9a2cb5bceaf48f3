"""UNets for inpainting: beside the latents they take the mask and the latents of the masked image.

The layout is runwayml/stable-diffusion-inpainting's: C channels of latents, 1 of the mask, C of the masked image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError

__all__ = ["extra_channels", "remember_whole_mask", "sample_extra", "whole_mask", "with_extra"]

_BUFFER = "whole_mask"


def extra_channels(unet: nn.Module) -> int:
    """How many channels the UNet takes beside the latents; 0 for text to image.

    Raises:
        SdqError: neither 0 nor 1 + C.
    """
    config: Any = unet.config
    extra = int(config.in_channels) - int(config.out_channels)
    if extra not in (0, 1 + int(config.out_channels)):
        raise SdqError(
            f"The denoiser takes {config.in_channels} channels and gives {config.out_channels}; supported are the same "
            "number, and for inpainting a mask and the masked image's latents beside them."
        )
    return extra


def remember_whole_mask(unet: nn.Module, vae: Any) -> None:
    """Keep, on an inpainting UNet, what it is given where there is no image and all is to be painted.

    Calls without a mask (training, evaluation, text to image) use it; it goes with every copy of the module and is not
    among its weights.
    """
    config: Any = unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    grey = torch.zeros(1, 3, height * factor, width * factor)
    with torch.no_grad():
        hidden = vae.config.scaling_factor * vae.encode(grey, return_dict=False)[0].mean
    unet.register_buffer(_BUFFER, torch.cat([torch.ones(1, 1, height, width), hidden], dim=1), persistent=False)


def whole_mask(unet: nn.Module) -> Tensor | None:
    """What `remember_whole_mask` kept, float32 [1, 1 + C, h, w]; None for text to image."""
    kept = getattr(unet, _BUFFER, None)
    return kept if isinstance(kept, Tensor) else None


def with_extra(unet: nn.Module, latents: Tensor, extra: Tensor | None = None) -> Tensor:
    """What the UNet is given: the latents [B, C, h, w] alone, or for inpainting with the extra channels behind them.

    Without ``extra`` [B, 1 + C, h, w] the whole image is masked.
    """
    whole = whole_mask(unet)
    if whole is None:
        return latents
    extra = whole.expand(latents.shape[0], -1, -1, -1) if extra is None else extra
    return torch.cat([latents, extra.to(latents)], dim=1)


def sample_extra(unet: nn.Module, count: int, generator: torch.Generator) -> Tensor | None:
    """Random masks and masked-image latents for parity, float32 [count, 1 + C, h, w]; None for text to image.

    Real numbers of every kind, not the one case that training sees: half of each mask is painted.
    """
    whole = whole_mask(unet)
    if whole is None:
        return None
    extra = torch.randn(count, *whole.shape[1:], generator=generator)
    extra[:, :1] = (extra[:, :1] > 0).float()
    return extra
