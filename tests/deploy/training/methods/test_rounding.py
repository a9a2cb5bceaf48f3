"""Learned rounding: its gradients, its start, its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdq_deploy.training.methods.rounding import (
    begin_rounding,
    finish_rounding,
    initial_rounding,
    rectified_sigmoid,
    rounding_beta,
    rounding_regularizer,
    soft_weight,
)
from sdq_deploy.training.student import Student
from sdq_engines.formats import INT4, INT8, PrecisionName
from sdq_export.checkpoint import weight_key
from tests.deploy.training.test_modelopt_backend import make_student


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    return weight, weight.abs().amax(dim=1, keepdim=True) / 5


def differences(function: object, x: Tensor, step: float = 1e-6) -> Tensor:
    """Central finite differences of a scalar function, element by element."""
    found = torch.zeros_like(x)
    for index in range(x.numel()):
        moved = x.clone().flatten()
        moved[index] += step
        above = function(moved.reshape(x.shape))
        moved[index] -= 2 * step
        found.view(-1)[index] = (above - function(moved.reshape(x.shape))) / (2 * step)
    return found


def test_gradients_of_the_soft_weight_equal_finite_differences() -> None:
    weight, scale = rows()
    # Spread over the sigmoid's whole range: its two ends are flat, and some rows clip at the grid's end.
    variables = torch.linspace(-4, 4, weight.numel(), dtype=torch.float64).reshape(weight.shape)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(v: Tensor) -> Tensor:
        return (soft_weight(weight, scale, v, INT4) * direction).sum()

    leaf = variables.clone().requires_grad_(True)
    value(leaf).backward()
    wanted = differences(value, variables)
    assert torch.allclose(leaf.grad, wanted, atol=1e-8)
    assert 0 < int((wanted == 0).sum()) < wanted.numel() / 2


@pytest.mark.parametrize("beta", [20.0, 7.5, 2.0])
def test_gradients_of_the_regularizer_equal_finite_differences(beta: float) -> None:
    variables = torch.linspace(-3.3, 3.1, 64, dtype=torch.float64)
    leaf = variables.clone().requires_grad_(True)
    rounding_regularizer(leaf, beta).backward()
    wanted = differences(lambda v: rounding_regularizer(v, beta), variables)
    assert torch.allclose(leaf.grad, wanted, atol=1e-7)


def test_the_regularizer_is_least_where_nothing_is_undecided() -> None:
    decided = torch.tensor([-10.0, 10.0, 10.0])
    assert float(rounding_regularizer(decided, 2.0)) == 0.0
    assert float(rounding_regularizer(torch.zeros(3), 2.0)) == pytest.approx(3.0)


def test_it_begins_with_the_weight_as_it_is() -> None:
    weight, scale = rows()
    variables = initial_rounding(weight, scale)
    assert torch.allclose(soft_weight(weight, scale, variables, INT8), weight, atol=1e-12)
    assert ((rectified_sigmoid(variables) >= 0) & (rectified_sigmoid(variables) <= 1)).all()


def test_beta_waits_then_falls_along_a_line() -> None:
    betas = [rounding_beta(step, 100, 0.2, 20.0, 2.0) for step in range(101)]
    assert betas[:20] == [None] * 20
    assert betas[20] == pytest.approx(20.0)
    assert betas[60] == pytest.approx(11.0)
    assert betas[100] == pytest.approx(2.0)


@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])
def test_what_is_fixed_are_the_integers_that_were_learned(precision: PrecisionName) -> None:
    """Down where h < 1/2, up where not; never further than one from rounding to nearest."""
    student, plain = make_student(precision), make_student(precision)
    nearest = plain.tensors()
    wanted: dict[str, Tensor] = {}
    for layer, quantizer in student.weight_quantizers.items():
        variables = begin_rounding(quantizer, student.weight(layer))
        with torch.no_grad():
            variables.copy_(torch.randn(variables.shape, generator=torch.Generator().manual_seed(3)))
        wanted[layer] = integers_by_hand(student, layer, variables)
        with torch.no_grad():
            finish_rounding(quantizer, student.weight(layer))
    found = student.tensors()
    changed = 0
    for layer, integers in wanted.items():
        assert torch.equal(found[weight_key(layer)], integers)
        gap = (integers.int() - nearest[weight_key(layer)].int()).abs()
        assert int(gap.max()) <= 1
        changed += int(gap.sum())
    assert changed > 1000
    # And a forward computes with exactly these.
    from sdq_export.reference import build_reference
    from tests.deploy.training.test_modelopt_backend import TIMESTEPS, inputs
    from tests.tiny import tiny_unet

    with torch.no_grad():
        reference = build_reference(tiny_unet(), student.spec, found, TIMESTEPS)(*inputs())
        assert torch.allclose(student.denoiser(*inputs()), reference, atol=1e-5)


def integers_by_hand(student: Student, layer: str, variables: Tensor) -> Tensor:
    site = student.spec.weight_sites[layer]
    weight, scale = student.weight(layer).detach(), student.weight_scale(layer).detach()
    width = site.format.block_size or weight[0].numel()
    down = torch.floor(weight.reshape(-1, width) / scale.reshape(-1, 1))
    high = site.format.high
    up = torch.sigmoid(variables.detach()) >= 0.5
    return (down + up).clamp(-high - 1, high).to(torch.int8).reshape(weight.shape)
