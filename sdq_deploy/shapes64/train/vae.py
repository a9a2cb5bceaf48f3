"""The autoencoder: 64x64 RGB to latents 4x8x8 and back, 1.8 million parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from sdq_deploy.shapes64.scenes import IMAGE_SIZE
from sdq_deploy.shapes64.train.dataset import drawn_images
from sdq_deploy.shapes64.train.latents import normalize_latents
from sdq_deploy.shapes64.train.loop import LoopConfig, StepRandom, is_main_process, run_loop, to_device_images

__all__ = ["VaeConfig", "build_vae", "prepare_vae", "train_vae"]


@dataclass(frozen=True)
class VaeConfig:
    """`images` drawn scenes in batches of `batch`; `kl_weight` times the KL of a whole latent, in nats; the latents
    are normalized over `normalized_over` of the images."""

    images: int = 20_000
    batch: int = 32
    kl_weight: float = 2e-6
    normalized_over: int = 4096


def build_vae() -> AutoencoderKL:
    """The untrained autoencoder; `scaling_factor` is 1 because training ends by normalizing the latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def prepare_vae(cache: Path, config: VaeConfig = VaeConfig()) -> None:
    """Draw the pictures that every process of the training then reads."""
    drawn_images(cache, config.images)


def train_vae(loop: LoopConfig, cache: Path, config: VaeConfig = VaeConfig()) -> None:
    """Train, and save the diffusers folder of the autoencoder, `loop.out`/vae."""
    images = drawn_images(cache, config.images)
    torch.manual_seed(loop.seed)
    vae = build_vae().to(loop.device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=loop.peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def loss_of(random: StepRandom) -> torch.Tensor:
        return _loss(vae, _batch(images, config.batch, random, loop.device), config, random)

    run_loop(loop, {"vae": vae}, optimizer, loss_of)
    if not is_main_process():
        return
    vae.eval()
    normalize_latents(vae, images[: config.normalized_over], loop.device)
    vae.save_pretrained(loop.out / "vae", safe_serialization=True)


def _batch(images: npt.NDArray[np.uint8], size: int, random: StepRandom, device: str) -> torch.Tensor:
    chosen = np.sort(random.numpy.choice(len(images), size, replace=False))
    return to_device_images(images[chosen[random.share]], device)


def _loss(vae: AutoencoderKL, images: torch.Tensor, config: VaeConfig, random: StepRandom) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        moments = vae._encode(images)
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        noise = torch.randn((config.batch, *mean.shape[1:]), generator=random.torch)[random.share].to(mean.device)
        decoded = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
    error = decoded.float() - images
    distance = (error.abs() + error.square()).mean(dim=1, keepdim=True)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=(1, 2, 3)).mean()
    loss: torch.Tensor = (distance * _attention(images)).mean() + config.kl_weight * kl
    return loss


def _attention(images: torch.Tensor) -> torch.Tensor:
    """1 on the background to 4 on and beside the shapes, which are the saturated pixels; float32 [N, 1, H, W]."""
    saturation = (images.amax(dim=1, keepdim=True) - images.amin(dim=1, keepdim=True)) / 2
    near: torch.Tensor = functional.max_pool2d(saturation, 7, stride=1, padding=3)
    weights: torch.Tensor = 1 + 3 * near
    return weights
