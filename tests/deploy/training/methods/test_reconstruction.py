"""Block-wise reconstruction: errors fall, integers stay near, and a killed one continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdq_deploy.recipes.schema import Reconstruction
from sdq_deploy.training.log import read_log
from sdq_deploy.training.methods.blocks import Samples, block_inputs, block_outputs, find_blocks
from sdq_deploy.training.methods.reconstruction import BlockFit, block_error
from sdq_export.checkpoint import load_checkpoint, weight_key
from sdq_export.stepping import StepDenoiser
from tests.deploy.training.helpers import start_worker, train, without_stages
from tests.deploy.training.methods.runs import snr_of, status_of
from tests.deploy.training.test_modelopt_backend import TIMESTEPS, make_student
from tests.tiny import prompt_rows, tiny_unet

SETTINGS: dict[str, Any] = {
    "method": "ptq-reconstruction",
    "reconstruction.iterations": 6,
    "reconstruction.batch_size": 4,
    "reconstruction.samples": 8,
    "reconstruction.rounding_lr": 0.1,
    "reconstruction.checkpoint_every": 2,
}


def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(24, 4, 8, 8, generator=generator)
    return Samples(latents, torch.arange(24) % 4, prompt_rows(torch.randn(24, 16, 32, generator=generator)))


@pytest.mark.parametrize(
    "name", ["mid_block.resnets.0", "up_blocks.1.attentions.0", "down_blocks.0.downsamplers.0.conv"]
)
def test_a_blocks_error_falls_and_its_integers_stay_within_one(name: str) -> None:
    student = make_student("w4a8")
    teacher = StepDenoiser(tiny_unet(), TIMESTEPS).eval().requires_grad_(False)
    block = next(block for block in find_blocks(teacher, student.spec, samples()) if block.name == name)
    nearest = student.tensors()
    targets = block_outputs(teacher, block, block_inputs(teacher, block, samples()))
    inputs = block_inputs(student.denoiser, block, samples())
    before = float(block_error(block_outputs(student.denoiser, block, inputs), targets))
    settings = Reconstruction(iterations=150, batch_size=16, rounding_lr=2e-2, activation_scale_lr=1e-3)
    work = BlockFit(student, block, settings, seed=0)
    while work.iteration < settings.iterations:
        work.step(inputs, targets)
    work.finish()
    after = float(block_error(block_outputs(student.denoiser, block, inputs), targets))
    assert after < 0.9 * before
    found = student.tensors()
    for site in student.spec.weights:
        gap = (found[weight_key(site.layer)].int() - nearest[weight_key(site.layer)].int()).abs()
        assert int(gap.max()) <= 1
        assert bool(gap.any()) == (site.layer in block.layers)


@pytest.fixture(scope="module")
def reconstructed(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reconstructed") / "run"
    train(tiny_sd, out, SETTINGS)
    return out


def test_it_ends_as_a_checkpoint(tiny_sd: Path, reconstructed: Path) -> None:
    checkpoint, status = load_checkpoint(reconstructed), status_of(reconstructed)
    assert checkpoint.info.notes["method"] == "ptq-reconstruction"
    measured = status["stages"]["fit"]["measured"]
    assert measured["peak_memory_bytes"] > 10**8
    blocks = measured["blocks"]
    assert [entry["block"] for entry in blocks[:2]] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0"]
    assert all(entry["before"] > 0 and entry["after"] > 0 for entry in blocks)
    best = checkpoint.info.notes["trajectory_snr_db"]["best"]
    assert snr_of(tiny_sd, reconstructed, checkpoint) == pytest.approx(best, abs=1e-3)
    assert {site.num_groups for site in checkpoint.spec.activations} == {1}


def test_killed_within_a_block_it_ends_where_an_undisturbed_one_ends(
    tiny_sd: Path, reconstructed: Path, tmp_path: Path
) -> None:
    out = without_stages(reconstructed, tmp_path / "run", "fit")
    worker = start_worker(tiny_sd, out, SETTINGS)
    resume = out / "fit" / "resume.pt"
    while True:
        if worker.poll() is not None:
            pytest.fail(worker.communicate()[0])
        if resume.is_file() and len(torch.load(resume, weights_only=True)["figures"]) >= 2:
            break
    worker.kill()
    worker.communicate()
    train(tiny_sd, out, SETTINGS)
    wanted, found = (status_of(run)["stages"]["fit"]["measured"]["blocks"] for run in (reconstructed, out))
    assert [entry["after"] for entry in found] == pytest.approx([entry["after"] for entry in wanted], rel=1e-4)
    assert [entry["before"] for entry in found] == pytest.approx([entry["before"] for entry in wanted], rel=1e-4)
    steps = [record["step"] for record in read_log(out / "log")]
    assert steps == sorted(set(steps))
