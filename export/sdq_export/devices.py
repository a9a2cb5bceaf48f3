"""Where teacher and reference run, and what goes wrong there when memory ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from sdq_engines.errors import SdqError

__all__ = ["DeviceChoice", "choose_device", "full_fp32", "memory_errors_named"]

DeviceChoice = Literal["auto", "cpu", "cuda"]

_BESIDE_BYTES = 4 << 30
"""A call's activations, and what CUDA itself takes."""

_ALLOCATOR = "DefaultCPUAllocator"
"""How torch's own message of a failed allocation begins; it is a plain RuntimeError."""


def choose_device(choice: DeviceChoice, parameters: int) -> str:
    """ "cuda" or "cpu"; "auto" is the GPU where torch has one with room for the network in FP32.

    Args:
        choice: the user's.
        parameters: of the network.

    Raises:
        SdqError: a GPU is asked for that torch does not have.
    """
    if choice == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if choice == "auto":
            return "cpu"
        raise SdqError("There is no CUDA device that torch can use.", "Leave --device out, or give --device cpu.")
    if choice == "auto" and torch.cuda.mem_get_info()[0] < 4 * parameters + _BESIDE_BYTES:
        return "cpu"
    return "cuda"


@contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions and products of this block in FP32 on a GPU too: TF32, a default there, errs by 1e-3."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def memory_errors_named(device: str) -> Iterator[None]:
    """An allocation that fails in this block is one sentence.

    Raises:
        SdqError: the memory of the machine, or of its GPU, did not suffice.
    """
    hint = "Close other programs, or export on a larger machine."
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SdqError(f"The memory of the {device} device does not suffice.", "Give --device cpu.") from error
    except MemoryError as error:
        raise SdqError("The memory of this machine does not suffice.", hint) from error
    except RuntimeError as error:
        if _ALLOCATOR not in str(error):
            raise
        raise SdqError("The memory of this machine does not suffice.", hint) from error
