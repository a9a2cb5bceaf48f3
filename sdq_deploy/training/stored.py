"""A tensor that lies in many files, read by its rows: what makes a dataset of any size take the memory of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from sdq_export.conditioning import Conditioning

__all__ = ["Prompts", "Rows", "StoredPrompts", "StoredTensor", "stored_tensors"]


class Rows(Protocol):
    """What a sampler needs of a tensor: some of its rows. A torch tensor is one, a `StoredTensor` another."""

    @property
    def shape(self) -> torch.Size:
        """[N, ...]."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """The chosen rows: a slice, a list, an index tensor, a mask."""


class Prompts(Protocol):
    """The conditioning of N prompts, of which some are wanted at a time. `Conditioning` is one."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: Any, /) -> Conditioning:
        """The chosen prompts."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of several safetensors files, joined along its first axis without being read.

    A file is open only while rows are read from it (some 0.1 ms each), so neither memory nor open files nor memory
    maps grow with their number, and a file may be replaced between two reads.

    Attributes:
        files: in order.
        name: of the tensor in each.
        starts: int64 [files + 1], the first row of each file, and N.
        shape: [N, ...].
        dtype: of the rows.
    """

    files: tuple[Path, ...]
    name: str
    starts: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Read rows, on the CPU, in the order asked for: a slice, a range, a list, an index tensor or a mask.

        Raises:
            IndexError: a row that is not there.
            OSError: a file that is gone.
        """
        wanted = torch.arange(len(self))[list(rows) if isinstance(rows, range) else rows]
        found = torch.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        places = torch.searchsorted(self.starts, wanted, right=True) - 1
        for place in torch.unique(places).tolist():
            at = (places == place).nonzero().flatten()
            self._read(place, wanted[at] - self.starts[place], found, at)
        return found

    def _read(self, place: int, rows: Tensor, into: Tensor, at: Tensor) -> None:
        with safe_open(self.files[place], framework="pt") as file:
            stored = file.get_slice(self.name)
            first = int(rows[0])
            if torch.equal(rows, torch.arange(first, first + len(rows))):
                into[at] = stored[first : first + len(rows)]
                return
            for row, target in zip(rows.tolist(), at.tolist(), strict=True):
                into[target] = stored[row : row + 1][0]


@dataclass(frozen=True)
class StoredPrompts:
    """The conditioning of prompts whose tensors are stored: made of the rows asked for."""

    tensors: Mapping[str, StoredTensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any, /) -> Conditioning:
        return Conditioning({name: stored[rows] for name, stored in self.tensors.items()})


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of these files by name. Their headers alone are read; all hold the same names.

    Raises:
        OSError: a file that is not there.
    """
    lengths: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = file.get_slice(name).get_shape()
                lengths.setdefault(name, []).append(shape[0])
                shapes[name] = tuple(shape[1:])
    with safe_open(files[0], framework="pt") as file:
        types = {name: file.get_slice(name)[:0].dtype for name in shapes}
    return {
        name: StoredTensor(
            tuple(files),
            name,
            torch.tensor([0, *lengths[name]]).cumsum(0),
            torch.Size((sum(lengths[name]), *shapes[name])),
            types[name],
        )
        for name in shapes
    }
