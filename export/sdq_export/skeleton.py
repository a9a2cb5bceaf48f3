"""A model's architecture without its weights: what a graph is captured of, whatever the model's size.

A large parameter is one number in memory, seen in the parameter's shape (all its strides are 0); what a graph makes of
it before it has values, a transposition, is such a view too. `passes/assign_weights.py` and the passes that quantize
put the values in, one layer after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["copy_module", "is_hollow", "is_hollow_tensor", "load_skeleton"]

_LARGE = 1 << 16
"""Elements; smaller parameters have memory of their own."""


def load_skeleton(kind: Any, folder: Path) -> Any:
    """A diffusers model by its configuration alone, in eval mode: its values mean nothing.

    Args:
        kind: the model's class.
        folder: holds its config.json.
    """
    with _parameters_without_memory():
        model: nn.Module = kind.from_config(kind.load_config(folder, local_files_only=True))
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[own_name] = nn.Parameter(_values(parameter.shape, index), requires_grad=False)
    return model.eval()


def is_hollow(array: NDArray[Any]) -> bool:
    """Whether a graph's constant is still the skeleton's: one number seen in a large shape."""
    return array.size > 1 and not _moves(array.shape, array.strides)


def is_hollow_tensor(tensor: torch.Tensor) -> bool:
    """Whether a parameter is still the skeleton's."""
    return tensor.numel() > 1 and not _moves(tensor.shape, tensor.stride())


def _moves(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether another index is another place in memory; an axis of length one has any stride."""
    return any(stride for length, stride in zip(shape, strides, strict=True) if length > 1)


def copy_module(module: nn.Module) -> Any:
    """A deep copy. Hollow parameters are shared: copied, each would have the memory of its shape (SDXL's: 10 GB)."""
    return copy.deepcopy(module, {id(each): each for each in module.parameters() if is_hollow_tensor(each)})


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules that are made in this block get parameters on torch's meta device; buffers, which are small, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _values(shape: torch.Size, index: int) -> torch.Tensor:
    """Other values for every parameter: what looks the same may be merged by an exporter."""
    if shape.numel() > _LARGE:
        return torch.full((1,), float(index)).expand(shape)
    return (index + torch.arange(1, shape.numel() + 1) / shape.numel()).reshape(shape)
