"""What a denoiser is told of its prompts: a few named tensors, one row a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.package.schema import SIZE_INPUT, TEXT_OUTPUT

__all__ = ["POOLED_INPUT", "SIZE_INPUT", "TEXT_INPUT", "Conditioning"]

#: Names of conditioning tensors, which are the prologue's inputs too (docs/package-format.md).
TEXT_INPUT, POOLED_INPUT = TEXT_OUTPUT, "pooled_embeddings"


@dataclass(frozen=True)
class Conditioning:
    """Per-prompt tensors by name; row i of each belongs to prompt i.

    Which names there are is the family's: `text_embeddings` [n, L, D], with SDXL also `pooled_embeddings` [n, P] and
    `time_ids` [n, 6]. All are float32 on the CPU as a family makes them.

    Raises:
        ValueError: there is no tensor, or their numbers of rows differ.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len({tensor.shape[0] for tensor in self.tensors.values()}) != 1:
            raise ValueError(f"rows differ: { {name: tuple(each.shape) for name, each in self.tensors.items()} }")

    def __len__(self) -> int:
        """n, the number of prompts."""
        return int(next(iter(self.tensors.values())).shape[0])

    def __getitem__(self, rows: Any) -> Conditioning:
        """Some of the prompts: a slice, a range, a list or an index tensor."""
        chosen = list(rows) if isinstance(rows, range) else rows
        return Conditioning({name: tensor[chosen] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on a device."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Conditioning:
        """A single prompt's rows for `count` samples."""
        return Conditioning({name: each.expand(count, *each.shape[1:]) for name, each in self.tensors.items()})

    def replace(self, rows: Any, other: Conditioning) -> Conditioning:
        """A copy whose `rows` are those of `other`, or its single one."""
        copied = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for name, tensor in copied.items():
            tensor[rows] = other.tensors[name]
        return Conditioning(copied)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All prompts of several, in order."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def numpy(self) -> dict[str, NDArray[np.float32]]:
        """Arrays by name, as graphs take them."""
        return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in self.tensors.items()}

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under `<prefix>.<name>`, to be saved; `from_named` reads them back."""
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in self.tensors.items()}

    @staticmethod
    def from_named(tensors: Mapping[str, Tensor], prefix: str) -> Conditioning:
        """What `named` made, out of all tensors of a file."""
        start = f"{prefix}."
        return Conditioning({name[len(start) :]: each for name, each in tensors.items() if name.startswith(start)})
