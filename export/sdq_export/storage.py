"""How a package stores weights; they are rounded before anything is captured or compared, so storing loses nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sdq_export.time_path import FrozenLinear

__all__ = ["Dtype", "IntegerDtype", "Storage", "round_weights_"]

Dtype = Literal["fp32", "fp16"]
"""How floating-point weights are stored; graphs compute in FP32 either way."""

IntegerDtype = Literal["int8", "int4"]
"""How weights are stored as integers (`sdq_export.integer_storage`); graphs compute in FP32 with these too."""


@dataclass(frozen=True)
class Storage:
    """How the weights of a package are stored: those of each component as integers, or None as `dtype` says."""

    dtype: Dtype = "fp16"
    prologue: IntegerDtype | None = None
    text_encoder: IntegerDtype | None = None
    """All text encoders."""
    vae: IntegerDtype | None = None
    """Decoder and encoder."""

    def integers_of(self, part: str) -> IntegerDtype | None:
        """Those that store a part of the checkpoint: its VAE, or a text encoder."""
        return self.vae if part == "vae" else self.text_encoder


def round_weights_(module: nn.Module, skip: Collection[str] = ()) -> None:
    """Round convolution, linear and embedding weights to FP16 numbers, in place, still typed FP32.

    A checkpoint that is distributed in FP16 or BF16 is unchanged by it: a weight of BF16 numbers, some of which are
    below FP16's range or above it, is stored as BF16 (`passes/store_fp16.py`).

    Args:
        module: any module.
        skip: paths of layers whose weights stay, because they are stored as integers.
    """
    with torch.no_grad():
        for path, part in module.named_modules():
            if not isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding | FrozenLinear) or path in skip:
                continue
            if not _is_exact(part.weight, torch.bfloat16):
                part.weight.copy_(part.weight.to(torch.float16).to(part.weight.dtype))


def _is_exact(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(weight.to(dtype).to(weight.dtype), weight)
