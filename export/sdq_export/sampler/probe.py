"""Driving a diffusers scheduler by hand: its state replaced at will, its noise chosen by the caller.

Every tensor of the samples' rank that a scheduler keeps between two steps (``ets`` and ``cur_sample`` of PNDM,
``model_outputs`` of DPM++ ...) is part of its state. Reading and overwriting those attributes between steps is all
that measuring needs; nothing in diffusers is changed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdq_export.dynamic_shift import settled_shift

__all__ = ["SchedulerProbe"]

SAMPLE_RANK = 4
Slot = tuple[str, int | None]


class SchedulerProbe:
    """A fresh scheduler set to ``num_inference_steps``, about to run its steps from ``start`` on.

    Args:
        scheduler: any diffusers scheduler; it is copied by its configuration, not touched.
        num_inference_steps: as in ``set_timesteps``.
        start: the index into ``timesteps`` of the first step to run, as img2img pipelines choose it.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int, start: int = 0) -> None:
        self.scheduler = type(scheduler).from_config(scheduler.config)
        shift = settled_shift(scheduler.config)
        self.scheduler.set_timesteps(num_inference_steps, **({} if shift is None else {"mu": shift}))
        self.timesteps: torch.Tensor = self.scheduler.timesteps
        self.start = start
        self._noise_draws = 0
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)

    def slots(self) -> list[Slot]:
        """Where the scheduler keeps its state now: (attribute, index in it or None), in a stable order."""
        found: list[Slot] = []
        for name, value in vars(self.scheduler).items():
            if _is_state(value):
                found.append((name, None))
            elif isinstance(value, list):
                found += [(name, position) for position, item in enumerate(value) if _is_state(item)]
        return found

    def read(self, slot: Slot) -> torch.Tensor:
        """The tensor in a slot."""
        name, position = slot
        value = getattr(self.scheduler, name)
        tensor: torch.Tensor = value if position is None else value[position]
        return tensor

    def write(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Replace the tensor in a slot."""
        name, position = slot
        if position is None:
            setattr(self.scheduler, name, tensor)
        else:
            getattr(self.scheduler, name)[position] = tensor

    def model_input(self, sample: torch.Tensor, step: int) -> torch.Tensor:
        """What the model is given at ``step``: ``scale_model_input`` where the scheduler has one."""
        scale: Callable[..., torch.Tensor] | None = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, self.timesteps[step])

    def step(self, model_output: torch.Tensor, step: int, sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One real ``scheduler.step``; fresh noise, if it asks for any, is ``noise``.

        Raises:
            ValueError: it asked for noise more than once, which one noise input cannot give.
        """
        with self._noise_is(noise):
            result = self.scheduler.step(model_output, self.timesteps[step], sample, return_dict=False)
        if self._noise_draws > 1:
            raise ValueError(f"its step {step} draws noise {self._noise_draws} times")
        latents: torch.Tensor = result[0]
        return latents

    def noised(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The start of an img2img run at ``start``, as diffusers' pipelines make it."""
        add_noise = getattr(self.scheduler, "add_noise", None)
        timestep = self.timesteps[self.start : self.start + 1]
        result: torch.Tensor = (
            add_noise(clean, noise, timestep)
            if add_noise is not None
            else self.scheduler.scale_noise(clean, timestep, noise)
        )
        return result

    @property
    def init_noise_sigma(self) -> float:
        """The factor of the starting noise; 1 where the scheduler names none (flow matching)."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    @contextlib.contextmanager
    def _noise_is(self, noise: torch.Tensor) -> Iterator[None]:
        """Let the scheduler's module draw ``noise`` instead of random numbers, and count how often it does."""
        module = sys.modules[type(self.scheduler).__module__]
        original = getattr(module, "randn_tensor", None)
        self._noise_draws = 0

        def draw(*_: Any, **__: Any) -> torch.Tensor:
            self._noise_draws += 1
            return noise.clone()

        if original is None:
            yield
            return
        module.randn_tensor = draw  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.randn_tensor = original  # type: ignore[attr-defined]


def _is_state(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == SAMPLE_RANK
