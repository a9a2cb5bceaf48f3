"""A checkpoint without its weights: what one forward of its networks costs, counted on fake tensors.

Fake tensors have shapes and no memory, so a model of any size is counted in seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdq_export.source import Source

__all__ = ["Sketch", "count_flops"]


class Sketch(Source):
    """A checkpoint whose models are made of their configurations; under fake tensors they take no memory."""

    def _model(self, kind: Any, name: str) -> Any:
        folder = self.folder / name
        if hasattr(kind, "config_class"):
            made = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        else:
            made = kind.from_config(kind.load_config(folder, local_files_only=True))
        return made.eval().requires_grad_(False)


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Floating-point operations of one forward; a multiplication and an addition are two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())
