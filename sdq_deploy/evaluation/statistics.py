"""How sure a figure is: seeded percentile bootstrap over prompts, and Fréchet distances of features.

The percentile bootstrap is Efron's (1979): the interval is that of the middle 95 % of the means of resampled prompts.
Every figure is resampled with the same seed, so the same prompts are drawn for all candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "Interval", "Moments", "frechet_distance", "frechet_interval", "mean_interval"]

Floats = NDArray[np.float64]

#: Of every interval.
CONFIDENCE = 0.95
RESAMPLES = 2000
FRECHET_RESAMPLES = 200

#: Resampled indices held at once: 8 bytes each.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Floats, seed: int = 0) -> Interval:
    """The mean of `values`, float64 [N], one a prompt; for a paired difference hand in the differences.

    One value has no interval: low and high are the value.
    """
    sample = np.asarray(values, np.float64)
    means = np.concatenate([sample[rows].mean(axis=1) for rows in _resamples(len(sample), RESAMPLES, seed)])
    low, high = _middle(means)
    return Interval(float(sample.mean()), low, high)


def _resamples(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Index rows [<= chunk, count]; the same for the same count, whatever is resampled."""
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, _CHUNK // max(count, 1)))
    for first in range(0, resamples, rows):
        yield rng.integers(0, count, (min(rows, resamples - first), count))


def _middle(values: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


class Moments:
    """Mean and covariance of features that pass by, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Floats = np.zeros(0)
        self._scatter: Floats = np.zeros((0, 0))

    def update(self, features: NDArray[np.floating]) -> None:
        """Add features [N, D]; batches are merged by Chan et al.'s formula, which does not cancel."""
        batch = np.asarray(features, np.float64)
        if len(batch) == 0:
            return
        mean = batch.mean(axis=0)
        centred = batch - mean
        scatter = centred.T @ centred
        if self.count:
            apart = mean - self._mean
            total = self.count + len(batch)
            scatter = self._scatter + scatter + np.outer(apart, apart) * (self.count * len(batch) / total)
            mean = self._mean + apart * (len(batch) / total)
        self._mean, self._scatter = mean, scatter
        self.count += len(batch)

    @property
    def mean(self) -> Floats:
        """[D]."""
        return self._mean

    @property
    def covariance(self) -> Floats:
        """[D, D], with N - 1; of fewer than two samples zero."""
        return self._scatter / max(self.count - 1, 1)


def moments_of(features: NDArray[np.floating]) -> Moments:
    """The moments of features [N, D]."""
    made = Moments()
    made.update(features)
    return made


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m_a - m_b||² + tr(C_a + C_b - 2 (C_a C_b)^1/2), the squared Fréchet distance of two Gaussians.

    Dowson and Landau (1982); "FID" in Heusel et al. (2017), with other features. The trace of the root is the nuclear
    norm of A_aᵀ A_b, where A Aᵀ = C, so singular covariances (fewer images than features) need no care.
    """
    apart = a.mean - b.mean
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(apart @ apart + trace))


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    root: Floats = vectors * np.sqrt(np.maximum(values, 0))
    return root


def frechet_interval(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    seed: int = 0,
    resamples: int = FRECHET_RESAMPLES,
    on_resample: Callable[[], object] = lambda: None,
) -> Interval:
    """The Fréchet distance of paired features [N, D], with an interval over prompts.

    A resample repeats some images, which inflates a Fréchet distance; so the resamples' spread around their own mean
    is laid around the distance of all images.

    Args:
        a, b: row i of both is of prompt i.
        seed, resamples: of the bootstrap.
        on_resample: hears each.
    """
    value = frechet_distance(moments_of(a), moments_of(b))
    found = []
    for rows in _resamples(len(a), resamples, seed):
        for row in rows:
            found.append(frechet_distance(moments_of(a[row]), moments_of(b[row])))
            on_resample()
    low, high = _middle(np.asarray(found) - np.mean(found))
    return Interval(value, max(0.0, value + low), value + high)
