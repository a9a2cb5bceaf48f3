"""AdamW, its moments in FP32 or in 8 bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Fit, OptimizerState
from sdq_engines.errors import SdqError

__all__ = ["check_optimizer", "make_optimizer", "moment_bytes", "optimizer_bytes"]

#: bitsandbytes' blocks, each with an FP32 scale; tensors of fewer elements than the second keep FP32 moments.
_BLOCK, _SMALLEST = 256, 4096


def check_optimizer(fit: Fit) -> None:
    """Refuse an optimizer whose library is not there, before any work is done.

    Raises:
        SdqError: with the pip command that brings it.
    """
    if fit.optimizer_state == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise SdqError(
            "fit.optimizer_state = 8bit needs bitsandbytes, which is not installed.",
            'Install it with: pip install "sdq-deploy[train,8bit]", or keep --set fit.optimizer_state=fp32',
        )


def make_optimizer(groups: list[dict[str, Any]], fit: Fit, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over these groups.

    8 bits: both moments in blocks of 256 elements with a scale each (Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", 2022), by bitsandbytes; the update itself is computed in FP32. Scales, biases and other tensors of
    fewer than 4,096 elements keep FP32 moments.

    Raises:
        SdqError: bitsandbytes is not installed.
    """
    if fit.optimizer_state == "fp32":
        return torch.optim.AdamW(groups, betas=fit.betas, fused=device.type in ("cpu", "cuda"))
    check_optimizer(fit)
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(groups, betas=fit.betas, min_8bit_size=_SMALLEST)
    return made


def moment_bytes(parameter: nn.Parameter, state: OptimizerState) -> int:
    """Bytes of the two moments of one parameter, the blocks' scales included."""
    elements = parameter.numel()
    if state == "fp32" or elements < _SMALLEST:
        return 2 * 4 * elements
    return 2 * (elements + 4 * -(-elements // _BLOCK))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors as they are; those that several parameters share count once."""
    seen: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim:
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                look(each)

    look(optimizer.state_dict()["state"])
    return sum(seen.values())
