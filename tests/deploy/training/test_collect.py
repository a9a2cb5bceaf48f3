"""The serial dataset: the teacher's own trajectories, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.prompts import stable_seed
from tests.deploy.training.helpers import small_context, small_settings, start_worker, train


def test_trajectories_are_those_of_diffusers(tiny_sd: Path, finished_run: Path) -> None:
    settings = small_settings(tiny_sd, finished_run)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        settings.prompts[3],
        num_inference_steps=settings.recipe.sampling.num_inference_steps,
        guidance_scale=settings.recipe.sampling.guidance_scale,
        generator=torch.Generator().manual_seed(stable_seed(settings.seed, "training", 3)),
        output_type="latent",
    ).images
    found = load_split(finished_run / "dataset", "training").shard.final[3:4]
    assert torch.linalg.vector_norm(found - wanted) <= 1e-4 * torch.linalg.vector_norm(wanted)


def test_keeps_the_chosen_steps_with_the_teachers_answers(tiny_sd: Path, finished_run: Path) -> None:
    context = small_context(tiny_sd, finished_run)
    data = load_split(finished_run / "dataset", "training")
    assert torch.equal(torch.bincount(data.shard.prompt_ids), torch.full((8,), 2))
    assert len({tuple(data.shard.steps[data.shard.prompt_ids == prompt].tolist()) for prompt in range(8)}) > 1
    rows = torch.tensor([1, 6])
    with torch.no_grad():
        found = context.teacher(
            data.shard.latents[rows], data.shard.steps[rows], data.conditioning[data.shard.prompt_ids[rows]]
        )
    torch.testing.assert_close(found, data.shard.conditional[rows], rtol=1e-4, atol=1e-5)


def test_every_step_of_the_held_out_prompts_is_kept(finished_run: Path) -> None:
    data = load_split(finished_run / "dataset", "validation")
    assert data.shard.steps.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.shard.prompt_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_without_guidance_the_empty_prompt_is_not_run(tiny_sd: Path, tmp_path: Path) -> None:
    from sdq_deploy.training.collect import collect

    context = small_context(tiny_sd, tmp_path / "run", {"sampling.guidance_scale": 1.0, "collect.num_prompts": 2})
    collect(context, "inputs")
    assert not load_split(tmp_path / "run" / "dataset", "training").guided


def test_killed_in_collect_finished_shards_are_not_made_again(
    tiny_sd: Path, finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    overrides = {"fit.max_train_steps": 0}
    worker = start_worker(tiny_sd, out, overrides)
    dataset = out / "dataset"
    while not list(dataset.glob("training-*.safetensors")):
        if worker.poll() is not None:
            pytest.fail(worker.communicate()[0])
    worker.kill()
    worker.communicate()
    before = {path: path.stat().st_mtime_ns for path in dataset.glob("*-*.safetensors")}
    assert before
    train(tiny_sd, out, overrides)
    assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
    wanted, found = (load_split(run / "dataset", "training").shard.latents[:] for run in (finished_run, out))
    assert torch.equal(found, wanted)
