"""The weight scale search against the plain definition."""

from __future__ import annotations

import torch

from sdq_deploy.training.search import max_scale, search_scale, search_weight_scale
from sdq_engines.formats import INT4, INT8, NumberFormat
from sdq_export.rounding import fake_quantize


def error(row: torch.Tensor, scale: torch.Tensor, format: NumberFormat) -> float:
    return float((fake_quantize(row, scale, format) - row).abs().pow(2.4).sum())


def test_finds_the_least_error_of_all_candidates() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 3, 3)
    found = search_weight_scale(weight, INT4)
    for channel in range(5):
        row = weight[channel].flatten()
        candidates = [max_scale(row.abs().max(), INT4) * point / 80 for point in range(1, 81)]
        best = min(error(row, candidate, INT4) for candidate in candidates)
        assert error(row, found[channel], INT4) <= best * (1 + 1e-4)
        assert error(row, found[channel], INT4) < error(row, candidates[-1], INT4)


def test_blocks_are_searched_alone() -> None:
    weight = torch.randn(4, 64) * torch.tensor([1.0] * 32 + [100.0] * 32)
    found = search_weight_scale(weight, INT4.in_blocks(32))
    assert found.shape == (4, 2)
    assert torch.equal(found[:, :1], search_weight_scale(weight[:, :32].contiguous(), INT4)[:, None])


def test_zeros_and_a_known_maximum() -> None:
    assert (search_weight_scale(torch.zeros(2, 8), INT8) > 0).all()
    rows = torch.rand(1, 100)
    assert search_scale(rows, INT8, points=1).item() == max_scale(rows.max(), INT8).item()
