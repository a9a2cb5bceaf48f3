"""Quantization-aware low-rank adapters (QALoRA): a frozen weight and its adapter, merged and quantized as one.

After He et al., "EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models" (ICLR 2024),
section 3.2: Y = Q(X, s_x) Q(W0 + B A, s_w). Training moves A, B and the scales; what is saved are the integers of the
sum, so inference knows no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.training.modelopt_backend import WeightForward
from sdq_deploy.training.student import Student

__all__ = ["AdapterForward", "attach_adapters", "merge"]


def merge(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """W0 + B A in the weight's shape, in FP32 also under autocast: rounding must see what will be saved.

    Args:
        weight: W0, f32 [C_out, ...].
        down: A, f32 [r, N], N being the elements of one output channel.
        up: B, f32 [C_out, r].
    """
    with torch.autocast(weight.device.type, enabled=False):
        return weight + (up @ down).reshape(weight.shape)


@dataclass(frozen=True)
class AdapterForward:
    """Fake quantization of a weight with its adapter."""

    quantize: WeightForward

    def before_rounding(self, x: Tensor, quantizer: Any) -> Tensor:
        """W0 + B A."""
        return merge(x, quantizer.adapter_down, quantizer.adapter_up)

    def __call__(self, x: Tensor, quantizer: Any) -> Tensor:
        return self.quantize(self.before_rounding(x, quantizer), quantizer)


def attach_adapters(student: Student, rank: int, seed: int) -> None:
    """Freeze the student but for its scales and a new adapter on every quantized weight.

    A is drawn as a Linear's weight is, B is 0, so that the student computes what it did.

    Args:
        student: changed in place.
        rank: r, at most the weight's own rank.
        seed: of A.
    """
    generator = torch.Generator().manual_seed(seed)
    student.denoiser.requires_grad_(False)
    for quantizer in (*student.weight_quantizers.values(), *student.activation_quantizers.values()):
        quantizer.log_scale.requires_grad_(True)
    for layer, quantizer in student.weight_quantizers.items():
        weight = student.weight(layer)
        channels, elements = weight.shape[0], weight[0].numel()
        width = min(rank, channels, elements)
        down = (2 * torch.rand(width, elements, generator=generator) - 1) / elements**0.5
        quantizer.adapter_down = nn.Parameter(down.to(weight.device))
        quantizer.adapter_up = nn.Parameter(torch.zeros(channels, width, device=weight.device))
        quantizer.lsq = AdapterForward(quantizer.lsq)
