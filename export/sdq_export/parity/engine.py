"""Criterion 4 (docs/quantization.md, "Parity"): an engine's distance from the teacher, over the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdq_engines.backends.base import Component
from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_export.parity.distances import compare_distances
from sdq_export.parity.graphs import identity_row, step_feeds
from sdq_export.parity.inputs import ParityInputs
from sdq_export.parity.report import Criterion

__all__ = ["ENGINE_LIMIT", "check_engine"]

ENGINE_LIMIT = 1.10
"""distance(engine, teacher) / distance(fake-quantized torch, teacher)."""

_FLOAT_FLOOR = 2e-3
"""Distances below this are FP16 noise, not quantization: of an unquantized package."""


def check_engine(
    name: str,
    inputs: ParityInputs,
    denoiser: Component,
    prompt: dict[str, NDArray[Any]],
    references: NDArray[np.float64],
    batch: int,
) -> Criterion:
    """Criterion 4: an engine's distance from the teacher over the reference's.

    Args:
        name: the engine.
        inputs: where to look.
        denoiser: its loaded denoiser.
        prompt: outputs of the prologue for the samples' embeddings, [2N, L, inner] each.
        references: the reference's distances at the gate's steps, [steps, N].
        batch: the most samples that the engine takes at once.
    """
    plan, samples, steps = inputs.plan, inputs.samples, inputs.gate.steps
    row = identity_row(plan.slots)
    found = []
    for step in steps:
        given = samples.model_inputs[step].numpy()
        parts = []
        for start in range(0, len(given), batch):
            part = given[start : start + batch]
            feeds = step_feeds(plan, part, step, samples.guidance.scale, row)
            feeds |= {key: _halves(value, start, len(part)) for key, value in prompt.items()}
            if samples.extra is not None:
                feeds[EXTRA_CHANNELS] = samples.extra[start : start + len(part)].numpy()
            parts.append(denoiser.run(feeds)["latents_out"].astype(np.float32))
        found.append(samples.distances(np.concatenate(parts), step))
    return compare_distances(
        f"engine:{name}",
        f"distance({name}, teacher) over distance(reference, teacher)",
        ENGINE_LIMIT,
        steps,
        np.stack(found),
        np.maximum(references, _FLOAT_FLOOR),
    )


def _halves(value: NDArray[Any], start: int, count: int) -> NDArray[Any]:
    """The unconditional and conditional rows of samples start to start+count out of [2N, ...]."""
    middle = len(value) // 2
    return np.concatenate([value[start : start + count], value[middle + start : middle + start + count]])
