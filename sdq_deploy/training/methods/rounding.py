"""Learned rounding (AdaRound): each weight learns whether it is rounded down or up.

After Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), equations 22 to 24:

    w_soft = s * clip(floor(w / s) + h(V), -Q_N, Q_P)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),    zeta = 1.1, gamma = -0.1     the rectified sigmoid
    f(V) = sum 1 - |2 h(V) - 1|^beta                         pushes every h to 0 or 1, harder as beta falls
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.training.lsq import broadcast_scale
from sdq_deploy.training.modelopt_backend import WeightForward
from sdq_engines.formats import NumberFormat

__all__ = [
    "RoundingForward",
    "begin_rounding",
    "finish_rounding",
    "initial_rounding",
    "rectified_sigmoid",
    "rounding_beta",
    "rounding_regularizer",
    "soft_weight",
]

_ZETA, _GAMMA = 1.1, -0.1


def rectified_sigmoid(variables: Tensor) -> Tensor:
    """h(V): 0 is down, 1 is up; both are reached."""
    return (torch.sigmoid(variables) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def initial_rounding(weight: Tensor, scale: Tensor) -> Tensor:
    """V at which the soft weight is the weight itself: h(V) = w / s - floor(w / s).

    Args:
        weight: [R, N], rows that share a scale.
        scale: [R, 1].
    """
    fraction = weight / scale - torch.floor(weight / scale)
    return -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)


def soft_weight(weight: Tensor, scale: Tensor, variables: Tensor, format: NumberFormat) -> Tensor:
    """s * clip(floor(w / s) + h(V), -Q_N, Q_P); differentiable in V where nothing is clipped.

    Args:
        weight: of any shape.
        scale: broadcasts over it; no gradient reaches it.
        variables: V, in the weight's shape.
        format: of integers.
    """
    return scale * (torch.floor(weight / scale) + rectified_sigmoid(variables)).clamp(format.low, format.high)


def rounding_regularizer(variables: Tensor, beta: float) -> Tensor:
    """f(V) = sum 1 - |2 h(V) - 1|^beta."""
    return (1 - (2 * rectified_sigmoid(variables) - 1).abs().pow(beta)).sum()


def rounding_beta(step: int, total: int, warmup: float, start: float, end: float) -> float | None:
    """beta at an iteration: None during the warm-up, when there is no regularizer, then a line from start to end."""
    first = warmup * total
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / max(1.0, total - first))


@dataclass(frozen=True)
class RoundingForward:
    """The soft weight in place of fake quantization, while its rounding is learned."""

    quantize: WeightForward

    def before_rounding(self, x: Tensor, quantizer: Any) -> Tensor:
        """A weight on the grid, by the rounding as it stands: rounding it to nearest gives its integers."""
        rows, scale = self._rows(x, quantizer)
        format = self.quantize.format
        up = rectified_sigmoid(quantizer.rounding) >= 0.5
        return (scale * (torch.floor(rows / scale) + up).clamp(format.low, format.high)).reshape(x.shape)

    def __call__(self, x: Tensor, quantizer: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows, scale = self._rows(x, quantizer)
            return soft_weight(rows, scale, quantizer.rounding, self.quantize.format).reshape(x.shape)

    def _rows(self, x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
        scale = quantizer.log_scale.detach().exp()
        width = self.quantize.format.block_size or x[0].numel()
        return x.float().reshape(-1, width), broadcast_scale(scale.flatten(), 2)


def begin_rounding(quantizer: Any, weight: Tensor) -> nn.Parameter:
    """Give a weight quantizer rounding variables, f32 [rows that share a scale, N], at which nothing is rounded."""
    forward = RoundingForward(quantizer.lsq)
    rows, scale = forward._rows(weight.detach(), quantizer)
    quantizer.rounding = nn.Parameter(initial_rounding(rows, scale))
    quantizer.lsq = forward
    parameter: nn.Parameter = quantizer.rounding
    return parameter


@torch.no_grad()
def finish_rounding(quantizer: Any, weight: nn.Parameter) -> None:
    """Fix the learned rounding: the weight moves onto its grid points, the quantizer is what it was."""
    weight.copy_(quantizer.lsq.before_rounding(weight, quantizer))
    quantizer.lsq = quantizer.lsq.quantize
    del quantizer.rounding
