"""`ComponentExport`: how a text encoder or an end of the VAE becomes a graph and is proved; data, by its family."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sdq_export.capture import FreeSize

__all__ = ["ComponentExport", "RoundingCost"]


@dataclass(frozen=True)
class RoundingCost:
    """What integer weights may cost a component, against its unrounded self (docs/quantization.md, "Parity").

    Attributes:
        option: of the command line, which asks for them.
        says: what is measured; ``{weights}`` stands for e.g. "the text encoder's INT8 weights".
        limit: of the error.
        measure: the modules of rounded and of unrounded weights, and an input -> the error, and details of it.
    """

    option: str
    says: str
    limit: float
    measure: Callable[[nn.Module, nn.Module, Tensor], tuple[float, dict[str, Any]]]


@dataclass(frozen=True)
class ComponentExport:
    """One component beside the denoiser and its prologue.

    Attributes:
        name: in the package.
        part: of the checkpoint, which has its weights.
        module: that part -> what is captured.
        inputs: examples of two, all of them batched along the first axis.
        outputs: names.
        rounding: what integer weights may cost.
        sized: the input whose height and width are left free.
        compared: in how many equal parts along the second axis an output is compared with torch's, each for itself.
        tokenizer: whose numbers its embeddings belong to.
        key: what the graph depends on beside weights, shapes and names.
    """

    name: str
    part: str
    module: Callable[[nn.Module], nn.Module]
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    rounding: RoundingCost
    sized: FreeSize | None = None
    compared: int = 1
    tokenizer: str | None = None
    key: tuple[Hashable, ...] = ()

    @property
    def words(self) -> str:
        """Its name, for people."""
        return self.name.replace("_", " ")
