"""Measuring a scheduler's steps as linear maps, and packing them into as few state slots as they need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sdq_export.sampler.plan import StepMap
from sdq_export.sampler.probe import SAMPLE_RANK, SchedulerProbe

__all__ = ["measure_steps", "pack_steps", "slots_needed"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class RawStep:
    """One measured step over every tensor that the scheduler keeps, needed or not.

    With n slots before the step and m after it (slot 0 is the sample in both): matrix [m, n], output [m],
    noise [m], u [n].
    """

    matrix: Array
    output: Array
    noise: Array
    u: Array


def measure_steps(probe: SchedulerProbe) -> list[RawStep]:
    """Run the probe to its end, each step on fresh basis vectors: slots, model output and noise.

    Before each step all of the state is replaced by unit vectors, so the tensors after the step hold that step's
    coefficients directly, free of what earlier steps would have accumulated.
    """
    return [_measure_step(probe, step) for step in range(probe.start, len(probe.timesteps))]


def _measure_step(probe: SchedulerProbe, step: int) -> RawStep:
    slots = probe.slots()
    states = 1 + len(slots)
    basis = torch.eye(states + 2).reshape(states + 2, 1, states + 2, 1, 1)
    for position, slot in enumerate(slots, start=1):
        probe.write(slot, basis[position].clone())
    u = _vector(probe.model_input(basis[0].clone(), step))
    sample = probe.step(basis[states].clone(), step, basis[0].clone(), noise=basis[states + 1])
    rows = np.stack([_vector(sample), *(_vector(probe.read(slot)) for slot in probe.slots())])
    return RawStep(rows[:, :states], rows[:, states], rows[:, states + 1], u[:states])


def _vector(tensor: torch.Tensor) -> Array:
    if tensor.ndim != SAMPLE_RANK:
        raise ValueError(f"a sample became a tensor of shape {tuple(tensor.shape)}")
    vector: Array = tensor.detach().to(torch.float32).flatten().numpy()
    return vector


def slots_needed(steps: list[RawStep]) -> int:
    """S: the most slots, the sample among them, that any step's past must hand to its future."""
    return max(len(live) for live in _live_slots(steps))


def pack_steps(steps: list[RawStep], slots: int) -> list[StepMap]:
    """The same steps over ``slots`` slots: whatever never reaches a later sample is dropped.

    Which tensor sits in which slot may change from step to step; the maps carry the renaming.
    """
    live = _live_slots(steps)
    return [_pack_step(raw, live[i], live[i + 1], slots) for i, raw in enumerate(steps)]


def _live_slots(steps: list[RawStep]) -> list[list[int]]:
    """For each boundary between steps (the start and the end included), the raw slots that are still needed."""
    needed = {0}
    live = [[0]]
    for raw in reversed(steps):
        read = set(np.flatnonzero(np.any(raw.matrix[sorted(needed)] != 0, axis=0))) | set(np.flatnonzero(raw.u))
        needed = {0} | {int(slot) for slot in read}
        live.append(sorted(needed))
    return live[::-1]


def _pack_step(raw: RawStep, before: list[int], after: list[int], slots: int) -> StepMap:
    matrix = np.zeros((slots, slots), np.float32)
    output, noise, u = (np.zeros(slots, np.float32) for _ in range(3))
    matrix[: len(after), : len(before)] = raw.matrix[np.ix_(after, before)]
    output[: len(after)] = raw.output[after]
    noise[: len(after)] = raw.noise[after]
    u[: len(before)] = raw.u[before]
    return StepMap(matrix, output, noise, u)
