"""Fidelity between images of the same prompts and seeds: PSNR and SSIM by torchmetrics, an image at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

__all__ = ["PSNR_CAP", "Fidelity", "compare_images"]

#: PSNR of identical images, which is infinite, is counted as this many dB so that means stay finite.
PSNR_CAP = 100.0


@dataclass(frozen=True)
class Fidelity:
    """Per-image figures of one set of images against the reference's.

    Attributes:
        psnr: float64 [N], dB, peak 255.
        ssim: float64 [N].
    """

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]

    def summary(self) -> dict[str, float]:
        """Mean and worst of both, and the share of images that are equal to the last bit."""
        return {
            "psnr_mean": float(self.psnr.mean()),
            "psnr_worst": float(self.psnr.min()),
            "ssim_mean": float(self.ssim.mean()),
            "ssim_worst": float(self.ssim.min()),
            "identical": float((self.psnr >= PSNR_CAP).mean()),
        }


def compare_images(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> Fidelity:
    """PSNR and SSIM of each image against the reference's image of the same prompt and seed.

    Args:
        images: uint8 [N, H, W, 3].
        reference: uint8 [N, H, W, 3].

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(f"{images.shape} images cannot be compared with {reference.shape}")
    squared = (images.astype(np.float64) - reference.astype(np.float64)) ** 2
    error = squared.mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        psnr = np.minimum(10 * np.log10(255.0**2 / error), PSNR_CAP)
    ssim = structural_similarity_index_measure(_planes(images), _planes(reference), data_range=1.0, reduction="none")
    return Fidelity(psnr=psnr, ssim=np.atleast_1d(ssim.double().numpy()))


def _planes(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
