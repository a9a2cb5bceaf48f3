"""Distances: of one array from another, and of two networks from the teacher as one criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdq_export.parity.report import Criterion

__all__ = ["compare_distances", "relative"]

_LEAST_CHANCE = 0.05
"""What a single step's ratio is always forgiven; see `compare_distances`."""

_FEW_PLACES = 12
_ONE_SAMPLE_CHANCE = 0.15
"""The same where a step has one sample, whose scatter cannot be told from it."""


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative L2 distance of one array from another."""
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))


def compare_distances(
    name: str,
    says: str,
    limit: float,
    steps: Sequence[int],
    found: NDArray[np.float64],
    wanted: NDArray[np.float64],
) -> Criterion:
    """A criterion on the ratio of two mean distances from the teacher, [steps, N] each.

    One step has few samples, and each quantizes differently in the two: a step is forgiven what four standard errors
    of the paired difference make, and at least `_LEAST_CHANCE`; where it has one sample, which has no such error,
    `_ONE_SAMPLE_CHANCE`. The ratio over all steps is forgiven nothing where there are places (steps times samples)
    enough; with few, its own two standard errors, at most `_LEAST_CHANCE`. Their interval is in the details.
    """
    reference = wanted.mean(axis=1)
    count, places = wanted.shape[1], wanted.size
    overall = float(found.mean() / wanted.mean())
    error = float((found - overall * wanted).std(ddof=1) / np.sqrt(places) / wanted.mean()) if places > 1 else 0.0
    return Criterion(
        name=name,
        says=says,
        limit=limit,
        steps=tuple(steps),
        per_step=tuple(float(ratio) for ratio in found.mean(axis=1) / reference),
        chance=_step_chances(found, wanted),
        overall=overall,
        overall_chance=min(2 * error, _LEAST_CHANCE) if places < _FEW_PLACES else 0.0,
        details={
            "samples": count,
            "interval": [float(f"{bound:.4g}") for bound in (overall - 2 * error, overall + 2 * error)],
            "distance": [float(f"{value:.4g}") for value in found.mean(axis=1)],
            "reference_distance": [float(f"{value:.4g}") for value in reference],
        },
        reference_by_sample=tuple(tuple(row) for row in wanted.tolist()),
    )


def _step_chances(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, ...]:
    steps, count = wanted.shape
    if count == 1:
        return (_ONE_SAMPLE_CHANCE,) * steps
    errors = (found - wanted).std(axis=1, ddof=1) / np.sqrt(count) / wanted.mean(axis=1)
    return tuple(max(4 * float(error), _LEAST_CHANCE) for error in errors)
