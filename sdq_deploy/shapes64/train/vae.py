"""The autoencoder: 64x64 RGB to latents 4x8x8 and back, 1.8 million parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from sdq_deploy.shapes64.scenes import IMAGE_SIZE
from sdq_deploy.shapes64.train.dataset import drawn_images
from sdq_deploy.shapes64.train.latents import normalize_latents
from sdq_deploy.shapes64.train.loop import LoopConfig, StepRandom, run_loop, to_device_images

__all__ = ["VaeConfig", "build_vae", "train_vae"]


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


def train_vae(loop: LoopConfig, cache: Path, config: VaeConfig = VaeConfig()) -> Path:
    """Train, and save the diffusers folder of the autoencoder; returns it."""
    images = drawn_images(cache, config.images)
    torch.manual_seed(loop.seed)
    vae = build_vae().to(loop.device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=loop.peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def loss_of(random: StepRandom) -> torch.Tensor:
        return _loss(vae, _batch(images, config.batch, random, loop.device), random, config.kl_weight)

    run_loop(loop, {"vae": vae}, optimizer, loss_of)
    vae.eval()
    normalize_latents(vae, images[: config.normalized_over], loop.device)
    folder = loop.out / "vae"
    vae.save_pretrained(folder, safe_serialization=True)
    return folder


def _batch(images: npt.NDArray[np.uint8], size: int, random: StepRandom, device: str) -> torch.Tensor:
    chosen = np.sort(random.numpy.choice(len(images), size, replace=False))
    return to_device_images(images[chosen], device)


def _loss(vae: AutoencoderKL, images: torch.Tensor, random: StepRandom, kl_weight: float) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        moments = vae._encode(images)
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        noise = torch.randn(mean.shape, generator=random.torch).to(mean.device)
        decoded = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
    error = decoded.float() - images
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=(1, 2, 3)).mean()
    return error.abs().mean() + error.square().mean() + kl_weight * kl
