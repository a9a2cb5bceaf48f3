"""What the denoiser trains on, computed once: normalized latents and token ids of drawn scenes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from sdq_deploy.shapes64.train.dataset import drawn_captions, drawn_images
from sdq_deploy.shapes64.train.loop import to_device_images
from sdq_deploy.shapes64.train.text import MAX_LENGTH

__all__ = ["encode_images", "encoded_scenes", "normalize_latents"]

_BATCH = 64


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: npt.NDArray[np.uint8], device: str) -> npt.NDArray[np.float32]:
    """Posterior means, float32 [N, 4, 8, 8], computed in BF16 autocast."""
    parts = []
    for start in range(0, len(images), _BATCH):
        with torch.autocast(device, torch.bfloat16):
            moments = vae._encode(to_device_images(images[start : start + _BATCH], device))
        parts.append(moments.float().chunk(2, dim=1)[0].cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: npt.NDArray[np.uint8], device: str) -> None:
    """Fold mean and deviation of each latent channel into the 1x1 convolutions either side of the latents.

    Afterwards every channel has mean 0 and deviation 1 over `images`, so `scaling_factor` is 1.
    """
    latents = encode_images(vae, images, device)
    mean = torch.from_numpy(latents.mean(axis=(0, 2, 3))).to(device)
    deviation = torch.from_numpy(latents.std(axis=(0, 2, 3))).to(device)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    inner.weight[:channels] /= deviation[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / deviation
    inner.bias[channels:] -= 2 * deviation.log()
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= deviation[None, :, None, None]


def encoded_scenes(
    vae_folder: Path, tokenizer: CLIPTokenizer, cache: Path, count: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents float32 [count, 4, 8, 8] and token ids int64 [count, MAX_LENGTH] of training scenes 0..count-1."""
    path = cache / f"latents-{count}.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(vae_folder).to(device).eval()
        partial = path.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(partial, encode_images(vae, drawn_images(cache, count), device))
        os.replace(partial, path)
    captions = drawn_captions(cache, count)
    ids = tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return torch.from_numpy(np.load(path)), ids
