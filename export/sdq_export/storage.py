"""What a package stores in FP16 is rounded before anything is captured or compared, so that storing loses nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["round_weights"]


def round_weights(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose convolution, linear and embedding weights are FP16 numbers, still typed FP32.

    A checkpoint that is distributed in FP16 is unchanged by it.
    """
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for part in rounded.modules():
            if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding):
                part.weight.copy_(part.weight.to(torch.float16).to(part.weight.dtype))
    return rounded
