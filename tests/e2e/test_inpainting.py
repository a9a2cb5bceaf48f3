"""An inpainting checkpoint goes the whole road: train, export with free size, build for a range, paint into a photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdq_engines.package.store import open_package
from tests.commands import fewer_options, run
from tests.tiny import write_tiny_sd

pytestmark = pytest.mark.slow


def test_train_export_and_paint(tmp_path: Path) -> None:
    prompts, trained, package, out = (tmp_path / name for name in ("prompts.txt", "run", "package", "image.png"))
    checkpoint = write_tiny_sd(tmp_path / "checkpoint", inpainting=True)
    prompts.write_text("\n".join(f"a red circle number {index}" for index in range(6)), encoding="utf-8")
    run("train", checkpoint, "--out", trained, "--recipe", "sd", "--prompts", prompts, "--cpu", *fewer_options())
    run("export", trained, "--out", package, "--dynamic-size",
        "--engine", "openvino", "--size", "64x64", "--size", "96x64")  # fmt: skip
    manifest = open_package(package).manifest
    assert (manifest.precision, manifest.io.extra_channels, manifest.io.size_multiple) == ("w4a8", 5, 32)
    assert "engine:openvino" in manifest.fidelity["parity"]
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (16, 16, 64, 48))
    mask.save(tmp_path / "mask.png")
    painting = ["--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--width", "96"]
    made = []
    for strength in ("1.0", "0.5"):
        run("run", package, "a red circle", *painting, "--strength", strength, "--seed", "7", "--out", out)
        made.append(np.asarray(Image.open(out), np.float32))
        assert made[-1].shape == (64, 96, 3)
    assert np.abs(made[0] - made[1]).mean() > 0.5
    run("run", package, "a red circle", "--seed", "7", "--out", out)
    assert Image.open(out).size == (64, 64)
    run("bench", package, "--engine", "openvino", "--runs", "3", "--against", checkpoint)
