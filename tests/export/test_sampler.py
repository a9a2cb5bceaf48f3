"""Compiled samplers against diffusers' own loop: same noise, same model, every scheduler, several steps and starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdq_engines.errors import SdqError
from sdq_export.checkpoint import SamplerSettings
from sdq_export.sampler import SCHEDULER_NAMES, SamplerPlan, compile_sampler, make_scheduler, run_sampler

SD_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
CASES: dict[str, Any] = {
    **{name: lambda name=name: make_scheduler(name, SD_CONFIG) for name in SCHEDULER_NAMES},
    "dpmpp-2m karras": lambda: diffusers.DPMSolverMultistepScheduler.from_config(SD_CONFIG, use_karras_sigmas=True),
    "dpmpp-2m sde": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
        SD_CONFIG, algorithm_type="sde-dpmsolver++"
    ),
    "euler karras": lambda: diffusers.EulerDiscreteScheduler.from_config(SD_CONFIG, use_karras_sigmas=True),
    "euler v-prediction trailing": lambda: diffusers.EulerDiscreteScheduler.from_config(
        SD_CONFIG, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "pndm with Runge-Kutta steps": lambda: diffusers.PNDMScheduler.from_config(SD_CONFIG, skip_prk_steps=False),
    "ddpm": lambda: diffusers.DDPMScheduler.from_config(SD_CONFIG),
}


def toy_model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a denoiser whose output depends on all of its input and the timestep."""
    mixed = sample + 0.3 * sample.roll(1, dims=-1)
    return torch.tanh(mixed * 0.7 + 0.002 * timestep) + 0.1 * sample


def diffusers_loop(scheduler: Any, steps: int, start: int, noise: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """The loop of diffusers' text-to-image (start 0) and image-to-image pipelines."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(11)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    if start == 0:
        sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    elif hasattr(scheduler, "add_noise"):
        sample = scheduler.add_noise(clean, noise, timesteps[:1])
    else:
        sample = scheduler.scale_noise(clean, timesteps[:1], noise)
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        extra = {} if isinstance(scheduler, diffusers.PNDMScheduler) else {"generator": generator}
        output = toy_model(scaled, float(timestep))
        sample = scheduler.step(output, timestep, sample, return_dict=False, **extra)[0]
    return sample


def compiled_loop(plan: SamplerPlan, start: int, noise: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return run_sampler(
        plan,
        lambda sample, step: toy_model(sample, float(plan.timesteps[step])),
        noise,
        start=start,
        clean_latents=clean if start else None,
        generator=torch.Generator().manual_seed(11),
    )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers_at_the_end_of_the_trajectory(name: str, steps: int) -> None:
    if name == "pndm with Runge-Kutta steps" and steps < 5:
        pytest.skip("diffusers' own Runge-Kutta warm-up needs four steps")
    plan = compile_sampler(CASES[name](), steps)
    generator = torch.Generator().manual_seed(3)
    noise, clean = torch.randn(2, 2, 4, 8, 8, generator=generator)
    for start in sorted({0, plan.calls // 3, plan.calls - 1}):
        wanted = diffusers_loop(CASES[name](), steps, start, noise, clean)
        assert relative(compiled_loop(plan, start, noise, clean), wanted) <= 1e-4, (start, plan.calls)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_at_zero_snr_the_end_is_as_near_as_fp32_allows(kind: str, steps: int) -> None:
    """The first sigma is 4096: a step takes latents of that size, whose last FP32 digit is 5e-4, and leaves small ones.

    So far from each other may the same formulas be, rounded in another order.
    """

    def make() -> Any:
        return getattr(diffusers, kind).from_config(
            SD_CONFIG, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        )

    plan = compile_sampler(make(), steps)
    assert plan.init_noise_sigma[0] == pytest.approx(4096, rel=1e-3)
    noise, clean = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found, wanted = compiled_loop(plan, 0, noise, clean), diffusers_loop(make(), steps, 0, noise, clean)
    assert relative(found, wanted) <= 5e-4 / float(wanted.std())
    if steps > 1:  # from a later start no such number is in the way
        start = plan.calls - 1
        found, wanted = compiled_loop(plan, start, noise, clean), diffusers_loop(make(), steps, start, noise, clean)
        assert relative(found, wanted) <= 1e-5


def test_a_division_by_zero_is_said() -> None:
    """At zero SNR a prediction of the noise says nothing of the image; diffusers' own loop ends in NaN."""
    scheduler = diffusers.DDIMScheduler.from_config(SD_CONFIG, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(SdqError, match="infinities or NaN of finite numbers"):
        compile_sampler(scheduler, 4)


def test_history_is_what_each_sampler_needs() -> None:
    needed = {name: compile_sampler(make_scheduler(name, SD_CONFIG), 10).history for name in SCHEDULER_NAMES}
    assert needed == {
        "ddim": 0, "pndm": 3, "euler": 0, "euler-ancestral": 0, "dpmpp-2m": 1, "lcm": 0, "flow-euler": 0,
    }  # fmt: skip


def test_only_samplers_that_draw_noise_are_stochastic() -> None:
    stochastic = {n for n in SCHEDULER_NAMES if compile_sampler(make_scheduler(n, SD_CONFIG), 8).stochastic}
    assert stochastic == {"euler-ancestral", "lcm"}


def test_pndm_makes_one_call_more_than_its_steps() -> None:
    plan = compile_sampler(make_scheduler("pndm", SD_CONFIG), 20)
    assert (plan.num_inference_steps, plan.calls) == (20, 21)


def test_multistep_coefficients_depend_on_the_start() -> None:
    """The figures of docs/architecture.md: step 8 of 20, reached from step 0 and begun there."""
    for name, full, begun in (("dpmpp-2m", -0.251, -0.170), ("pndm", -0.391, -0.170)):
        plan = compile_sampler(make_scheduler(name, SD_CONFIG), 20)
        found = [float(plan.step_map(start, 8).output[0]) for start in (0, 8)]
        assert found == pytest.approx([full, begun], abs=0.06), name
        assert abs(found[0] - found[1]) > 0.05


def test_steps_before_the_start_are_zero() -> None:
    plan = compile_sampler(make_scheduler("ddim", SD_CONFIG), 6)
    for start in range(plan.calls):
        assert not plan.coefficients[start, :start].any()
        assert plan.coefficients[start, start:].any(axis=1).all()


def test_a_saved_plan_comes_back_equal(tmp_path: Path) -> None:
    plan = compile_sampler(make_scheduler("dpmpp-2m", SD_CONFIG), 7)
    plan.save(tmp_path / "sampler.safetensors")
    loaded = SamplerPlan.load(tmp_path / "sampler.safetensors")
    for name in ("coefficients", "timesteps", "init_noise_sigma", "noising"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(plan, name))
    for name in ("history", "stochastic", "scheduler", "config", "num_inference_steps"):
        assert getattr(loaded, name) == getattr(plan, name)


def test_a_file_that_is_no_sampler_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(SdqError, match="not a sampler"):
        SamplerPlan.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("scheduler", "setting"),
    [
        (diffusers.DDIMScheduler(clip_sample=True), "clip_sample"),
        (diffusers.DDIMScheduler(clip_sample=False, thresholding=True), "thresholding"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
        (diffusers.LCMScheduler(clip_sample=True), "clip_sample"),
        (
            diffusers.DDIMScheduler(
                clip_sample=True,
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                rescale_betas_zero_snr=True,
            ),
            "clip_sample",
        ),
        (diffusers.DDPMScheduler(clip_sample=True), "clip_sample"),
    ],
)
def test_a_nonlinear_setting_is_refused_by_name(scheduler: Any, setting: str) -> None:
    with pytest.raises(SdqError) as refused:
        compile_sampler(scheduler, 12)
    assert type(scheduler).__name__ in refused.value.message
    assert f"{setting}=True" in refused.value.message
    assert setting in refused.value.hint


def test_a_step_count_that_the_scheduler_does_not_take_is_one_sentence() -> None:
    with pytest.raises(SdqError, match="LCMScheduler cannot be compiled for 60 steps"):
        compile_sampler(make_scheduler("lcm", SD_CONFIG), 60)
    with pytest.raises(SdqError, match="at least 1"):
        compile_sampler(make_scheduler("ddim", SD_CONFIG), 0)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SdqError, match="There is no scheduler 'dimm'") as refused:
        make_scheduler("dimm", SD_CONFIG)
    assert "dpmpp-2m" in refused.value.hint
    with pytest.raises(SdqError, match="NoSuchScheduler"):
        make_scheduler(None, {"_class_name": "NoSuchScheduler"})


def test_the_sources_own_scheduler_is_the_default() -> None:
    assert type(make_scheduler(None, SD_CONFIG)).__name__ == "PNDMScheduler"


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_recorded_configuration_makes_the_same_sampler(name: str) -> None:
    """As a checkpoint's quant.json and a package's manifest record it."""
    plan = compile_sampler(make_scheduler(name, SD_CONFIG), 3)
    settings = SamplerSettings(scheduler=plan.scheduler, config=plan.config, num_inference_steps=3, guidance_scale=4.0)
    read = SamplerSettings.model_validate_json(settings.model_dump_json())
    again = compile_sampler(getattr(diffusers, read.scheduler).from_config(read.config), read.num_inference_steps)
    assert np.array_equal(again.coefficients, plan.coefficients)
    assert np.array_equal(again.timesteps, plan.timesteps)


def test_on_step_sees_every_model_call() -> None:
    plan = compile_sampler(make_scheduler("euler", SD_CONFIG), 5)
    seen: list[int] = []
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run_sampler(
        plan, lambda sample, step: toy_model(sample, 0.0), noise, start=2, on_step=lambda step, x, y: seen.append(step)
    )
    assert seen == [2, 3, 4]
