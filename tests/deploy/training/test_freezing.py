"""Selective freezing, by hand-made integer sequences."""

from __future__ import annotations

import pytest
import torch

from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.freezing import FreezingTracker, Oscillation, freezing_threshold
from sdq_export.checkpoint import dequantize_weight, quantize_weight
from tests.deploy.training.test_modelopt_backend import make_student


def follow(sequence: list[int], momentum: float, threshold: float) -> Oscillation:
    state = Oscillation.begin(torch.tensor([sequence[0]], dtype=torch.int8))
    for value in sequence[1:]:
        state.update(torch.tensor([value], dtype=torch.int8), momentum, threshold)
    return state


def test_frequency_counts_changes_against_the_last_direction() -> None:
    """Up, down, up, down: the first change has no direction before it, the other three flip."""
    state = follow([0, 1, 0, 1, 0], momentum=0.5, threshold=1.0)
    assert state.frequency.item() == pytest.approx(((0.5 * 0.5) + 0.5) * 0.5 + 0.5)
    assert not state.frozen.item()


def test_a_steady_move_is_no_oscillation() -> None:
    assert follow([0, 1, 2, 3, 3, 4], momentum=0.5, threshold=0.1).frequency.item() == 0.0


def test_an_oscillating_weight_is_pinned_at_its_average() -> None:
    state = follow([0, 1, 1, 1, 0, 1, 1, 1], momentum=0.3, threshold=0.4)
    assert state.frozen.item()
    assert state.pinned.item() == 1


def test_int8_extremes_do_not_wrap() -> None:
    assert follow([-8, 7], momentum=0.5, threshold=1.0).direction.item() == 1
    assert follow([127, -128], momentum=0.5, threshold=1.0).direction.item() == -1


def test_threshold_falls_by_a_cosine() -> None:
    settings = load_recipe("shapes-64").freezing
    assert freezing_threshold(settings, 0, 100) == pytest.approx(0.1)
    assert freezing_threshold(settings, 50, 100) == pytest.approx(0.055)
    assert freezing_threshold(settings, 100, 100) == pytest.approx(0.01)


def test_frozen_weights_keep_their_integers_while_the_scale_moves() -> None:
    student = make_student("w4a8")
    layer = student.spec.weights[0].layer
    tracker = FreezingTracker(student, [layer], load_recipe("shapes-64").freezing)
    state, site = tracker.states[layer], tracker.sites[layer]
    state.frozen[0] = True
    pinned = state.pinned[0].clone()
    with torch.no_grad():
        student.weight(layer).add_(0.05)
        student.weight_quantizers[layer].log_scale.add_(0.2)
    tracker.after_step(1, 10)
    scale = student.weight_scale(layer)
    assert torch.equal(quantize_weight(student.weight(layer), scale, site)[0], pinned)
    assert torch.equal(student.weight(layer)[0], dequantize_weight(state.pinned, scale, site)[0])
    assert 0 < tracker.fractions()[1] < 1


def test_eight_bit_layers_are_left_alone() -> None:
    student = make_student("w8a8")
    layers = [site.layer for site in student.spec.weights]
    assert FreezingTracker(student, layers, load_recipe("shapes-64").freezing).states == {}
