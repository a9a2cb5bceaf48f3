"""What a package stores in FP16 is rounded before anything is captured or compared, so that storing loses nothing."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from sdq_export.families.time_path import FrozenLinear

__all__ = ["round_weights_"]


def round_weights_(module: nn.Module, skip: Collection[str] = ()) -> None:
    """Round convolution, linear and embedding weights to FP16 numbers, in place, still typed FP32.

    A checkpoint that is distributed in FP16 is unchanged by it.

    Args:
        module: any module.
        skip: paths of layers whose weights stay, because they are stored as integers.
    """
    with torch.no_grad():
        for path, part in module.named_modules():
            if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding | FrozenLinear) and path not in skip:
                part.weight.copy_(part.weight.to(torch.float16).to(part.weight.dtype))
