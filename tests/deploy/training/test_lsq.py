"""LSQ against the formulas of the paper written out, and against finite differences where they exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdq_deploy.training.lsq import (
    broadcast_scale,
    fake_quantize_lsq,
    sample_scale,
    step_gradient_scale,
)
from sdq_engines.formats import INT4, INT8, NumberFormat
from sdq_export.rounding import fake_quantize


def by_hand(x: Tensor, scale: Tensor, grad: Tensor, bits: int, factor: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and scale, element by element, as equations 2 and 3 of LSQ say."""
    q_n, q_p = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    ratio = x / scale
    grad_x = torch.where((ratio > -q_n) & (ratio < q_p), grad, torch.zeros_like(grad))
    slope = torch.where(ratio <= -q_n, -float(q_n), torch.where(ratio >= q_p, float(q_p), ratio.round() - ratio))
    return grad_x, (grad * slope).sum_to_size(scale.shape) * factor


@pytest.mark.parametrize("format", [INT4, INT8], ids=["4", "8"])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 10)])
def test_forward_is_the_reference_and_backward_is_the_paper(format: NumberFormat, shape: tuple[int, ...]) -> None:
    torch.manual_seed(format.bits)
    x = torch.randn(shape, requires_grad=True)
    # Scales small enough that values fall outside on both sides.
    scale = (broadcast_scale(torch.rand(shape[0]) * 0.5 + 0.5, len(shape)) * 2 / 2**format.bits).requires_grad_()
    out = fake_quantize_lsq(x, scale, format, 0.37)
    assert torch.equal(out, fake_quantize(x.detach(), scale.detach(), format))
    grad = torch.randn(shape)
    out.backward(grad)
    wanted_x, wanted_scale = by_hand(x.detach(), scale.detach(), grad, format.bits, 0.37)
    assert (wanted_x == 0).any()
    assert torch.equal(x.grad, wanted_x)
    torch.testing.assert_close(scale.grad, wanted_scale, rtol=1e-4, atol=1e-5)


def test_scale_gradient_is_the_slope_where_everything_clips() -> None:
    """Outside the range x_hat = +-s Q: smooth in s, so finite differences must agree exactly."""
    x = torch.tensor([[9.0, -9.0, 12.0]], dtype=torch.float32)
    scale = torch.tensor([[0.5]], requires_grad=True)
    fake_quantize_lsq(x, scale, INT4, 1.0).sum().backward()
    step = 2**-6
    higher = fake_quantize(x, scale.detach() + step, INT4).sum()
    lower = fake_quantize(x, scale.detach() - step, INT4).sum()
    assert scale.grad.item() == pytest.approx((higher - lower).item() / (2 * step))
    assert scale.grad.item() == 7 - 8 + 7


def test_logarithm_keeps_scales_positive_and_scales_the_gradient() -> None:
    x = torch.randn(4, 32)
    log_scale = torch.full((4,), -3.0, requires_grad=True)
    fake_quantize_lsq(x, broadcast_scale(log_scale.exp(), 2), INT8, 1.0).square().sum().backward()
    plain = torch.full((4,), -3.0).exp().requires_grad_()
    fake_quantize_lsq(x, broadcast_scale(plain, 2), INT8, 1.0).square().sum().backward()
    torch.testing.assert_close(log_scale.grad, plain.grad * plain.detach())


def test_each_sample_uses_and_trains_the_scale_of_its_own_step() -> None:
    table = torch.tensor([0.1, 0.2, 0.4], requires_grad=True)
    groups, steps = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 1, 0])
    x = torch.randn(3, 2, 5)
    out = fake_quantize_lsq(x, sample_scale(table, groups, steps, 3), INT8, 1.0)
    for row, scale in enumerate([0.4, 0.1, 0.1]):
        assert torch.equal(out[row], fake_quantize(x[row], torch.tensor(scale), INT8))
    out.sum().backward()
    assert table.grad[1] == 0
    assert table.grad[0] != 0


def test_gradient_scale_does_not_depend_on_the_batch() -> None:
    """Two halves of a batch, their losses averaged, give the gradient of the whole: what several processes do."""

    def gradient(x: Tensor) -> Tensor:
        table = torch.tensor([0.05], requires_grad=True)
        scale = sample_scale(table, torch.tensor([0]), torch.zeros(len(x), dtype=torch.long), 2)
        fake_quantize_lsq(x, scale, INT8, step_gradient_scale(x[0].numel(), INT8)).square().mean().backward()
        return table.grad

    x = torch.randn(8, 16)
    torch.testing.assert_close(gradient(x), (gradient(x[:4]) + gradient(x[4:])) / 2)


def test_computes_in_fp32_under_autocast() -> None:
    x = torch.randn(4, 64)
    scale = torch.full((1, 1), 0.01234567)
    with torch.autocast("cpu", torch.bfloat16):
        out = fake_quantize_lsq(x, scale.expand(4, 1), INT8, 1.0)
        low = fake_quantize_lsq(x.bfloat16(), scale.expand(4, 1), INT8, 1.0)
    assert torch.equal(out, fake_quantize(x, scale, INT8))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, fake_quantize(x.bfloat16().float(), scale, INT8).bfloat16())
