"""Training of the caption classifier on drawn scenes, softened as generated pictures are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.nn import functional

from sdq_deploy.shapes64.captions import contents_of
from sdq_deploy.shapes64.classifier import PAIRS, CaptionClassifier
from sdq_deploy.shapes64.train.dataset import drawn_captions, drawn_images
from sdq_deploy.shapes64.train.loop import LoopConfig, StepRandom, run_loop, to_device_images

__all__ = ["ClassifierConfig", "train_classifier"]


@dataclass(frozen=True)
class ClassifierConfig:
    """`images` drawn scenes in batches of `batch`; an eighth of each batch has passed through the autoencoder."""

    images: int = 60_000
    batch: int = 64


def train_classifier(loop: LoopConfig, vae: Path, cache: Path, config: ClassifierConfig = ClassifierConfig()) -> Path:
    """Train, and save `classifier.safetensors` in FP16; returns its path."""
    images = drawn_images(cache, config.images)
    labels = _labels(drawn_captions(cache, config.images))
    autoencoder = AutoencoderKL.from_pretrained(vae).to(loop.device).eval()
    torch.manual_seed(loop.seed)
    classifier = CaptionClassifier().to(loop.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=loop.peak_lr, weight_decay=1e-2)

    def loss_of(random: StepRandom) -> torch.Tensor:
        chosen = np.sort(random.numpy.choice(len(images), config.batch, replace=False))
        batch = to_device_images(images[chosen], loop.device)
        order = torch.randperm(len(chosen), generator=random.torch)
        batch, wanted = batch[order], torch.from_numpy(labels[chosen])[order].to(loop.device)
        seen = _augment(_reconstruct_some(autoencoder, batch, random), random)
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = classifier(seen).float()
        return functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(batch)

    run_loop(loop, {"classifier": classifier}, optimizer, loss_of)
    path = loop.out / "classifier.safetensors"
    save_file({key: value.half().contiguous().cpu() for key, value in classifier.state_dict().items()}, path)
    return path


def _labels(captions: list[str]) -> npt.NDArray[np.float32]:
    labels = np.zeros((len(captions), len(PAIRS)), dtype=np.float32)
    for row, caption in zip(labels, captions, strict=True):
        row[[PAIRS.index(pair) for pair in contents_of(caption)]] = 1.0
    return labels


@torch.no_grad()
def _reconstruct_some(vae: AutoencoderKL, images: torch.Tensor, random: StepRandom) -> torch.Tensor:
    """The first eighth through the autoencoder, with a little noise on its latents as a denoiser leaves."""
    count = len(images) // 8
    with torch.autocast(images.device.type, torch.bfloat16):
        mean = vae._encode(images[:count]).float().chunk(2, dim=1)[0]
        noise = torch.randn(mean.shape, generator=random.torch).to(mean.device)
        decoded = vae.decode(mean + noise * float(random.numpy.uniform(0.0, 0.12))).sample
    return torch.cat([decoded.float().clamp(-1, 1), images[count:]])


def _augment(images: torch.Tensor, random: StepRandom) -> torch.Tensor:
    """Each half of the batch, independently: shifted up to 2 pixels, blurred, noised, brightened a little."""
    parts = []
    for part in images.chunk(2):
        dx, dy = (int(v) for v in random.numpy.integers(-2, 3, size=2))
        part = functional.pad(part, (2, 2, 2, 2), mode="replicate")[:, :, 2 + dy : 66 + dy, 2 + dx : 66 + dx]
        if random.numpy.random() < 0.5:
            part = _blur(part, float(random.numpy.uniform(0.3, 1.0)))
        gain, offset = float(random.numpy.uniform(0.93, 1.07)), float(random.numpy.uniform(-0.05, 0.05))
        noise = torch.randn(part.shape, generator=random.torch).to(part.device)
        parts.append(part * gain + offset + noise * float(random.numpy.uniform(0.0, 0.06)))
    return torch.cat(parts)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    offsets = torch.arange(-2, 3, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    padded = functional.pad(images, (2, 2, 2, 2), mode="replicate")
    rows = functional.conv2d(padded, kernel[:, None, :, None], groups=3)
    return functional.conv2d(rows, kernel[:, None, None, :], groups=3)
