"""Learned step size quantization: the forward and backward of fake quantization (docs/quantization.md).

After Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 3 and section 2.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sdq_engines.formats import NumberFormat
from sdq_export.rounding import round_

__all__ = ["broadcast_scale", "fake_quantize_lsq", "sample_scale", "step_gradient_scale"]


def step_gradient_scale(elements: int, format: NumberFormat) -> float:
    """1 / sqrt(N * Q_P), which makes a scale's gradient comparable with the weights' (LSQ section 2.2).

    Args:
        elements: N, elements that share the scale: of one channel or block for a weight, of one *sample* for an
            activation, so that the size of the batch, and of each process's part of it, does not matter.
        format: Q_P is its greatest code.
    """
    return 1.0 / math.sqrt(elements * format.high)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, format: NumberFormat, gradient_scale: float) -> Tensor:
        x_hat = round_(x / scale, format).mul_(scale)
        ctx.save_for_backward(x, x_hat, scale)
        ctx.range = (format.low, format.high, gradient_scale)
        return x_hat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, x_hat, scale = ctx.saved_tensors
        low, high, gradient_scale = ctx.range
        # The gradient where -Q_N < x / s < Q_P, 0 elsewhere: what hardtanh's backward computes, in one pass.
        grad_x = torch.ops.aten.hardtanh_backward(grad, x / scale, low, high)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        # dx_hat/ds = round(v) - v inside and the clipped code outside = (x_hat - [inside] x) / s.
        slope = torch.mul(grad, x_hat).addcmul_(grad_x, x, value=-1).sum_to_size(scale.shape)
        return grad_x, (slope / scale).mul_(gradient_scale), None, None


def fake_quantize_lsq(x: Tensor, scale: Tensor, format: NumberFormat, gradient_scale: float) -> Tensor:
    """Round `x` to `scale` times a code of the format, half to even, with LSQ's gradients.

    They hold for any format: rounding counts as the identity (straight through), so inside the limits x_hat = s v_hat
    changes with s by the rounding error v_hat - v, outside by the clipped code. Of integers that error is uniform in
    [-1/2, 1/2]. Of FP8 it is up to 1/16 of v itself: the scale is drawn to where the large values round well and are
    not clipped, which is what decides there, for a float's relative precision is the same at every scale.

    The arithmetic is FP32 whatever the dtype of `x`, also under autocast; the result has the dtype of `x`.

    Args:
        x: any shape, floating point.
        scale: FP32, positive, of as many dimensions as `x`: the leading ones of `x`, then ones.
        format: whose codes.
        gradient_scale: factor on the gradient of `scale`, from `step_gradient_scale`.
    """
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = _FakeQuantize.apply(x.float(), scale, format, gradient_scale)  # type: ignore[no-untyped-call]
        return result.to(x.dtype)


def broadcast_scale(scale: Tensor, ndim: int) -> Tensor:
    """A scale per output channel, [C], shaped [C, 1, ...] for a weight of `ndim` dimensions."""
    return scale.reshape(-1, *(1 for _ in range(ndim - 1)))


def sample_scale(table: Tensor, groups: Tensor, steps: Tensor, ndim: int) -> Tensor:
    """The scale of each sample at its own step, shaped [B, 1, ...] for an activation of `ndim` dimensions.

    Args:
        table: f32 [G], one scale per scale group.
        groups: int64 [T], the scale group of each step.
        steps: int64 [B], the step of each sample.
        ndim: dimensions of the activation, batch first.
    """
    return table[groups[steps]].reshape(-1, *(1 for _ in range(ndim - 1)))
