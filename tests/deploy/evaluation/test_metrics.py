"""PSNR and SSIM against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest

from sdq_deploy.evaluation.grids import comparison_grid, contact_sheet
from sdq_deploy.evaluation.metrics import PSNR_CAP, compare_images


def test_psnr_is_per_image() -> None:
    reference = np.full((2, 64, 64, 3), 100, np.uint8)
    images = reference.copy()
    images[1] += 10
    figures = compare_images(images, reference)
    assert figures.psnr.tolist() == pytest.approx([PSNR_CAP, 10 * np.log10(255**2 / 100)])
    summary = figures.summary()
    assert summary["identical"] == 0.5
    assert summary["psnr_worst"] == pytest.approx(28.13, abs=0.01)


def test_ssim_falls_with_structure() -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images = reference.copy()
    images[1] = np.clip(images[1].astype(int) + rng.normal(0, 30, images[1].shape), 0, 255).astype(np.uint8)
    images[2] = 255 - images[2]
    ssim = compare_images(images, reference).ssim
    assert ssim[0] == pytest.approx(1.0)
    assert ssim[0] > ssim[1] > ssim[2]


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_images(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8))


def test_pictures_hold_every_image() -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8) for name in ("FP", "W4A8\ntrained")}
    grid = np.asarray(comparison_grid(rows))
    doubled = rows["FP"][2].repeat(2, 0).repeat(2, 1)
    assert any((grid[6 : 6 + 128, x : x + 128] == doubled).all() for x in range(grid.shape[1] - 127)), (
        "the third image is not in the first row"
    )
    assert contact_sheet(rows["FP"], ["a red circle"] * 4, columns=2).height > 256
