"""`compile_sampler`: a diffusers scheduler to a `SamplerPlan`, or a refusal that names the reason."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdq_engines.errors import SdqError
from sdq_export.sampler.measure import measure_steps, pack_steps, slots_needed
from sdq_export.sampler.plan import SamplerPlan, StepMap, row_length
from sdq_export.sampler.probe import SchedulerProbe

__all__ = ["LINEARITY_TOLERANCE", "compile_sampler"]

LINEARITY_TOLERANCE = 1e-6
"""Largest L2 distance from the real scheduler's step on random inputs, relative to the largest tensor in the step.

Linear ones stay below 1e-7: what FP32 leaves of terms that cancel. At zero SNR a sigma is 4096, and a step may leave
latents a thousandth as large as those that it took.
"""

_NONLINEAR_SETTINGS = ("thresholding", "clip_sample", "rescale_betas_zero_snr")
_CHECK_SHAPE = (2, 4, 16, 16)


def compile_sampler(scheduler: Any, num_inference_steps: int) -> SamplerPlan:
    """Measure ``scheduler`` at ``num_inference_steps`` from every start index, and check the result against it.

    Args:
        scheduler: a diffusers scheduler; only its class and configuration are used.
        num_inference_steps: as in ``set_timesteps``; PNDM makes one model call more.

    Raises:
        SdqError: the scheduler, or one of its settings, is not linear in its state, or it does not take this number
            of steps.
    """
    name = type(scheduler).__name__
    if num_inference_steps < 1:
        raise SdqError(
            f"The number of inference steps is {num_inference_steps}; it must be at least 1.",
            "For example --num-inference-steps 20",
        )
    try:
        return _compile(scheduler, num_inference_steps)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        # diffusers raises these itself for settings and step counts that a scheduler does not take
        raise SdqError(
            f"The scheduler {name} cannot be compiled for {num_inference_steps} steps: {error}", _hint(scheduler)
        ) from error


def _compile(scheduler: Any, num_inference_steps: int) -> SamplerPlan:
    calls = len(SchedulerProbe(scheduler, num_inference_steps).timesteps)
    probes = [SchedulerProbe(scheduler, num_inference_steps, start) for start in range(calls)]
    noising = np.stack([_noising(SchedulerProbe(scheduler, num_inference_steps, start)) for start in range(calls)])
    measured = [measure_steps(probe) for probe in probes]
    slots = max(slots_needed(steps) for steps in measured)
    coefficients = np.zeros((calls, calls, row_length(slots)), np.float32)
    for start, steps in enumerate(measured):
        coefficients[start, start:] = [step.pack() for step in pack_steps(steps, slots)]
    init_noise_sigma = noising[:, 1].copy()
    init_noise_sigma[0] = probes[0].init_noise_sigma
    plan = SamplerPlan(
        coefficients=coefficients,
        timesteps=probes[0].timesteps.to(torch.float32).numpy().copy(),
        init_noise_sigma=init_noise_sigma,
        noising=noising,
        history=slots - 1,
        stochastic=any(bool(np.any(step.noise[0] != 0)) for steps in measured for step in steps),
        scheduler=type(scheduler).__name__,
        config=_plain_config(scheduler),
        num_inference_steps=num_inference_steps,
        order=int(getattr(scheduler, "order", 1)),
    )
    for start in range(calls):
        _check_linear(scheduler, plan, start)
    return plan


def _noising(probe: SchedulerProbe) -> NDArray[np.float32]:
    """``a, b`` of ``a * clean + b * noise``, read off unit inputs."""
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return np.array([probe.noised(one, zero).item(), probe.noised(zero, one).item()], np.float32)


def _check_linear(scheduler: Any, plan: SamplerPlan, start: int) -> None:
    """Compare the plan with the real scheduler, step by step along one trajectory of random model outputs and noise."""
    probe = SchedulerProbe(scheduler, plan.num_inference_steps, start)
    generator = torch.Generator().manual_seed(start)
    sample = float(plan.init_noise_sigma[start]) * torch.randn(_CHECK_SHAPE, generator=generator)
    state = torch.zeros(plan.slots, *_CHECK_SHAPE)
    rounding = torch.zeros(plan.slots)  # what FP32 may have lost of each slot of the state
    for step in range(start, plan.calls):
        state[0], rounding[0] = sample, 0.0
        # outputs of three standard deviations leave the range that clipping schedulers keep
        output = 3.0 * torch.randn(_CHECK_SHAPE, generator=generator)
        noise = torch.randn(_CHECK_SHAPE, generator=generator)
        step_map = plan.step_map(start, step)
        taken, left = state, _apply(step_map, state, output, noise)
        largest = max(float(torch.linalg.vector_norm(each)) for each in (*taken, output, noise, *left))
        maps = torch.from_numpy(np.vstack([step_map.u, step_map.matrix]))
        lost = LINEARITY_TOLERANCE * largest + maps.abs() @ rounding
        _require_close(scheduler, _combine(step_map.u, taken), probe.model_input(sample, step), lost[0])
        sample = probe.step(output, step, sample, noise)
        _require_close(scheduler, left[0], sample, lost[1])
        state, rounding = left, lost[1:]


def _combine(weights: NDArray[np.float32], state: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(torch.from_numpy(weights), state, dims=1)


def _apply(step_map: StepMap, state: torch.Tensor, output: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    add = torch.from_numpy(np.stack([step_map.output, step_map.noise], axis=1))
    added = torch.tensordot(add, torch.stack([output, noise]), dims=1)
    return torch.tensordot(torch.from_numpy(step_map.matrix), state, dims=1) + added


def _require_close(scheduler: Any, found: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> None:
    """`allowed`: the L2 distance that rounding alone may make."""
    distance = float(torch.linalg.vector_norm(found - wanted) / allowed.clamp_min(1e-30))
    if not wanted.isfinite().all():
        raise ValueError("its step makes infinities or NaN of finite numbers")
    # "not <=" so that NaN is refused too
    if not distance <= 1:
        settings = [f"{key}={scheduler.config[key]}" for key in _NONLINEAR_SETTINGS if scheduler.config.get(key)]
        reason = f" with {' and '.join(settings)}" if settings else ""
        raise SdqError(
            f"The scheduler {type(scheduler).__name__}{reason} is not linear in its state "
            f"(on random inputs its step is {distance:.1e} times as far from a linear map as rounding explains), "
            "so it cannot be part of a package.",
            _hint(scheduler),
        )


def _hint(scheduler: Any) -> str:
    settings = [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]
    if settings:
        wanted = ", ".join(f'"{key}": false' for key in settings)
        return f"Set {wanted} in scheduler/scheduler_config.json, or choose another with --scheduler."
    return "Choose another with --scheduler, for example --scheduler ddim"


def _plain_config(scheduler: Any) -> dict[str, Any]:
    """The configuration as JSON gives it back: what is saved and loaded compares equal.

    JSON has no infinity (DPM++'s lambda_min_clipped is -inf, and came back as null, which diffusers refuses), and
    infinities are diffusers' defaults, so they are left out.
    """
    config = {
        key: value
        for key, value in scheduler.config.items()
        if not key.startswith("_") and not (isinstance(value, float) and math.isinf(value))
    }
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain
