"""Old configurations are read as diffusers' own pipeline class reads them: its constructor repairs some settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from sdq_engines.errors import SdqError
from sdq_export.package_manifest import free_size_of
from sdq_export.sampler import compile_sampler
from sdq_export.source import Source, load_source
from tests.export.test_sampler_pipelines import GUIDANCE, PROMPT, STEPS, ours
from tests.nearness import relative

Tiny = Callable[[str], Path]
PNDM = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULER = PNDM | {"_class_name": "EulerDiscreteScheduler"}


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... takes one out."""
    tree = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}), "utf-8")


def copy_with(checkpoint: Path, out: Path, scheduler: dict[str, Any], whole: bool = False) -> Path:
    """A copy whose scheduler differs: some keys, or the whole of it."""
    folder = Path(shutil.copytree(checkpoint, out))
    if whole:
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler), "utf-8")
        edit(folder / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    else:
        edit(folder / "scheduler/scheduler_config.json", **scheduler)
    return folder


def of_diffusers(folder: Path, **parts: Any) -> Any:
    """The pipeline that a user gets; what the tiny checkpoints leave out is left out by name."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    absent = [name for name in ("safety_checker", "text_encoder_3", "tokenizer_3") if name in index]
    pipeline = DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, **{name: None for name in absent if not (folder / name).is_dir()}, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    return made


def settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize(
    ("kind", "scheduler", "whole", "repaired"),
    [
        ("sd", {"steps_offset": ...}, False, {"steps_offset": 1}),
        ("sd", {"steps_offset": 0, "clip_sample": True}, False, {"steps_offset": 1, "clip_sample": False}),
        ("sd", {"clip_sample": ...}, False, {"clip_sample": False}),
        ("sd", PNDM, True, {"steps_offset": 1, "skip_prk_steps": False}),
        ("sd", EULER | {"timestep_spacing": "leading"}, True, {"steps_offset": 1}),
        ("sd2", {"steps_offset": ...}, False, {"steps_offset": 1}),
        ("sd-inpainting", PNDM, True, {"steps_offset": 1, "skip_prk_steps": True}),
        ("sdxl", {"steps_offset": 0}, False, {"steps_offset": 0}),
        ("sd3", {"shift": 2.0}, False, {"shift": 2.0}),
    ],
)
def test_a_scheduler_is_what_the_pipeline_makes_of_it(
    kind: str, scheduler: dict[str, Any], whole: bool, repaired: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    folder = copy_with(tiny(kind), tmp_path / "model", scheduler, whole)
    found, wanted = load_source(folder).scheduler, of_diffusers(folder).scheduler
    assert type(found) is type(wanted)
    assert settings(found) == settings(wanted)
    assert repaired.items() <= settings(found).items()
    wanted.set_timesteps(10)
    assert compile_sampler(found, 10).timesteps.tolist() == wanted.timesteps.tolist()


def test_the_latents_are_those_of_the_pipeline(tiny: Tiny, tmp_path: Path) -> None:
    """Of the two repairs that change most: without them there is another image, or no package."""
    folder = copy_with(tiny("sd"), tmp_path / "model", {"steps_offset": ..., "clip_sample": ...})
    source, wanted = load_source(folder), latents(of_diffusers(folder))
    assert relative(ours(source, compile_sampler(source.scheduler, STEPS)), wanted) <= 1e-4
    unrepaired = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    assert relative(ours(source, compile_sampler(unrepaired, STEPS)), wanted) > 1e-3


def test_a_shift_by_the_size_is_that_of_the_pipeline_at_the_packages_size(tiny: Tiny, tmp_path: Path) -> None:
    """What the file leaves open is diffusers' default; a plan is made again from its own record."""
    for number, own in enumerate(({}, {"base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 64})):
        shifted = {"use_dynamic_shifting": True, "base_shift": ..., "max_shift": ...} | own
        folder = copy_with(tiny("sd3"), tmp_path / str(number), shifted)
        source, pipeline = load_source(folder), of_diffusers(folder)
        wanted = latents(pipeline)
        plan = compile_sampler(source.scheduler, STEPS)
        assert plan.timesteps.tolist() == pipeline.scheduler.timesteps.tolist()
        assert relative(ours(source, plan), wanted) <= 1e-4
        again = compile_sampler(diffusers.FlowMatchEulerDiscreteScheduler.from_config(plan.config), STEPS)
        assert np.array_equal(again.coefficients, plan.coefficients)
        assert np.array_equal(compile_sampler(source.scheduler_named("flow-euler"), STEPS).timesteps, plan.timesteps)
        with pytest.raises(SdqError, match="each size of image has timesteps of its own"):
            free_size_of(source, plan)
    assert free_size_of(load_source(tiny("sd3")), compile_sampler(load_source(tiny("sd3")).scheduler, STEPS))


def test_a_shift_by_the_size_is_refused_where_diffusers_hands_none(tiny: Tiny, tmp_path: Path) -> None:
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    source = load_source(copy_with(tiny("sd"), tmp_path / "model", scheduler, whole=True))
    with pytest.raises(SdqError, match="StableDiffusionPipeline hands its scheduler no shift"):
        _ = source.scheduler
    with pytest.raises(SdqError, match="no size is named"):
        compile_sampler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), STEPS)


def test_another_scheduler_is_repaired_as_if_the_checkpoint_had_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = copy_with(tiny("sd"), tmp_path / "model", {"steps_offset": ...})
    named = load_source(folder).scheduler_named("euler")
    given = diffusers.EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert given.config.steps_offset == 0
    wanted = of_diffusers(folder, scheduler=given).scheduler
    assert settings(named) == settings(wanted)
    assert named.config.steps_offset == 1


def test_the_plans_own_record_is_repaired(tiny: Tiny, tmp_path: Path) -> None:
    """What a run and a package record makes the same scheduler where nothing repairs it again."""
    folder = copy_with(tiny("sd"), tmp_path / "model", {"steps_offset": ...})
    plan = compile_sampler(load_source(folder).scheduler, 5)
    assert plan.config["steps_offset"] == 1
    again = diffusers.DDIMScheduler.from_config(plan.config)
    again.set_timesteps(5)
    assert again.timesteps.tolist() == plan.timesteps.tolist()


@pytest.mark.parametrize(("version", "size"), [("0.8.1", 64), ("0.9.0", 8)])
def test_the_sample_size_of_the_oldest_unets(version: str, size: int, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("sd"), tmp_path / "model"))
    edit(folder / "unet/config.json", _diffusers_version=version)
    source = load_source(folder)
    assert of_diffusers(folder).unet.config.sample_size == size
    assert source.family.latent_shape == (4, size, size)
    assert source.denoiser.config.sample_size == size


def test_a_pipeline_leaves_the_scheduler_that_it_is_given_alone(tiny: Tiny) -> None:
    source: Source = load_source(tiny("sd"))
    scheduler = diffusers.PNDMScheduler.from_config(PNDM)
    source.pipeline(scheduler, "StableDiffusionInpaintPipeline")
    assert not scheduler.config.skip_prk_steps
    assert scheduler.config.steps_offset == 0
