"""Bootstrap intervals and Fréchet distances against what they are by theory."""

from __future__ import annotations

import numpy as np
import pytest

from sdq_deploy.evaluation.statistics import Moments, frechet_distance, frechet_interval, mean_interval, moments_of


def test_interval_of_a_mean_is_that_of_theory() -> None:
    """Of 400 normal values: mean ± 1.96 standard errors, within the bootstrap's own noise."""
    values = np.random.default_rng(1).normal(30.0, 4.0, 400)
    found = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    intervals = [mean_interval(rng.exponential(1.0, 100), seed=seed) for seed in range(200)]
    covered = np.mean([found.low <= 1.0 <= found.high for found in intervals])
    assert 0.88 <= covered <= 0.99


def test_an_interval_is_the_same_every_time_and_pairs_its_resamples() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=300)
    assert mean_interval(a) == mean_interval(a)
    # The difference of two sets that move together is known far better than either.
    paired = mean_interval((a + 0.5) - a)
    assert (paired.low, paired.value, paired.high) == pytest.approx((0.5, 0.5, 0.5))


def test_many_values_are_resampled_in_bounded_memory() -> None:
    found = mean_interval(np.arange(50_000, dtype=np.float64))
    assert found.low < 24_999.5 < found.high


def test_moments_of_batches_are_those_of_the_whole() -> None:
    features = np.random.default_rng(4).normal(1e4, 1.0, (500, 7))
    found = Moments()
    for first in range(0, 500, 33):
        found.update(features[first : first + 33])
    assert found.count == 500
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


class _Gaussian(Moments):
    """Moments that are given, not measured."""

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        super().__init__()
        self.count, self._mean, self._scatter = 2, mean, covariance


def test_frechet_distance_of_two_gaussians() -> None:
    """Commuting covariances: |Δm|² + Σ (σ_a - σ_b)², in any basis."""
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    a = _Gaussian(np.array([1.0, 2.0, 3.0]), rotation @ np.diag([1.0, 4.0, 9.0]) @ rotation.T)
    b = _Gaussian(np.array([1.0, 0.0, 3.5]), rotation @ np.diag([4.0, 4.0, 0.0]) @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(4.25 + 1 + 0 + 9)
    assert frechet_distance(b, a) == pytest.approx(14.25)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute() -> None:
    """In two dimensions tr (AB)^½ = sqrt(tr AB + 2 sqrt(det AB))."""
    a = np.array([[2.0, 0.5], [0.5, 1.0]])
    b = np.array([[1.0, -0.4], [-0.4, 3.0]])
    zero = np.zeros(2)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(_Gaussian(zero, a), _Gaussian(zero, b)) == pytest.approx(expected)


def test_frechet_distance_agrees_with_torchmetrics() -> None:
    """The same features through its metric."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 6

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double()

    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(80, 6)), rng.normal(0.3, 1.4, (70, 6))
    metric = FrechetInceptionDistance(feature=Flat()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a).reshape(80, 6, 1, 1), real=True)
    metric.update(torch.from_numpy(b).reshape(70, 6, 1, 1), real=False)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_frechet_interval_lies_around_the_distance() -> None:
    """Resampling inflates the distance; the interval must not be of the inflated one."""
    rng = np.random.default_rng(7)
    a = rng.normal(size=(60, 20))
    found = frechet_interval(a, a + rng.normal(0, 0.3, a.shape), resamples=60)
    assert 0 < found.low < found.value < found.high
    same = frechet_interval(a, a, resamples=10)
    assert (same.low, same.value, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
