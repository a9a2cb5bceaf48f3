"""A linear layer that is evaluated ahead of the denoising loop: nothing trains or quantizes its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FixedLinear", "fix_linears_"]


class FixedLinear(nn.Module):
    """Stands where a Linear was whose outputs a package precomputes (docs/quantization.md, TIP).

    Weight and bias are buffers under the names that the Linear had, so a state dict does not change; the product is
    computed in the weight's own precision, under autocast too.

    Args:
        linear: shares its memory.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


def fix_linears_(module: nn.Module) -> None:
    """Replace every Linear inside `module` by a FixedLinear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, FixedLinear(child))
        else:
            fix_linears_(child)
