"""The recipe of real Stable Diffusion checkpoints, on a tiny one: train with BF16 and checkpointing, export, run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sdq_deploy.cli import main
from sdq_engines.package.store import open_package
from tests.deploy.training.test_cli import sdq_train

pytestmark = pytest.mark.slow

#: Fewer of everything; what the recipe says of scheduler, precisions, losses and rates stays.
FEWER = {
    "sampling.num_inference_steps": 4,
    "collect.num_prompts": 4,
    "collect.validation_prompts": 2,
    "collect.steps_per_prompt": 2,
    "calibrate.samples_per_step": 2,
    "sensitivity.samples": 2,
    "fit.max_train_steps": 4,
    "fit.batch_size": 2,
    "fit.validate_every": 2,
}


def run(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.run([str(argument) for argument in arguments])
    assert exit_.value.code == 0


def test_train_export_and_run(tiny_sd: Path, tmp_path: Path) -> None:
    prompts, trained, package, image = (tmp_path / name for name in ("prompts.txt", "run", "package", "image.png"))
    prompts.write_text("\n".join(f"a red circle number {index}" for index in range(6)), encoding="utf-8")
    options = [word for key, value in FEWER.items() for word in ("--set", f"{key}={value}")]
    result = sdq_train(tiny_sd, "--out", trained, "--recipe", "sd", "--prompts", prompts, "--cpu", *options)
    assert result.returncode == 0, result.stderr
    run("export", trained, "--out", package, "--engine", "openvino")
    manifest = open_package(package).manifest
    assert (manifest.precision, manifest.sampler.scheduler) == ("w4a8", "DDIMScheduler")
    assert manifest.sampler.guidance_scale == 7.5
    run("run", package, "a red circle", "--seed", "7", "--out", image)
    assert Image.open(image).size == (64, 64)
