"""What training holds in memory: its trainable state, and the peak of all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from sdq_deploy.recipes.schema import OptimizerState
from sdq_deploy.training.optimizer import moment_bytes
from sdq_engines.process import peak_memory_bytes

__all__ = ["peak_bytes", "reset_peak", "state_bytes"]

_RESET = Path("/proc/self/clear_refs")


def state_bytes(parameters: Iterable[nn.Parameter], moments: OptimizerState = "fp32") -> int:
    """Bytes that training keeps for these parameters: each with its gradient and AdamW's two moments."""
    return sum(
        2 * parameter.numel() * parameter.element_size() + moment_bytes(parameter, moments) for parameter in parameters
    )


def reset_peak(device: torch.device) -> None:
    """Begin to watch for the peak, where the system can forget an earlier one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: 5 sets the peak of the resident set back to what is resident now.
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: the tensors of a CUDA device, else this process's resident set.

    Where the system keeps only the peak of the whole process (macOS), that one; 0 where it keeps none.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()
