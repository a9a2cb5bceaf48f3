"""The components beside the denoiser: each graph against torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_export.families.component import ComponentExport
from sdq_export.parity.graphs import GraphFile, open_graph
from sdq_export.parity.report import Criterion
from sdq_export.scratch import temporary_folder

__all__ = ["check_component", "component_outputs"]

_LIMIT = 1e-4


@torch.no_grad()
def component_outputs(module: nn.Module, given: Tensor) -> tuple[Tensor, ...]:
    """What torch makes of a component's one input."""
    outputs = module(given)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_component(
    graph: GraphFile | ir.Model, export: ComponentExport, given: Tensor, wanted: Sequence[Tensor]
) -> Criterion:
    """A component's graph against torch; the worst of its outputs, or of their parts.

    Args:
        graph: of the component.
        export: which it is.
        given: its input.
        wanted: what torch makes of that, by `component_outputs`.
    """
    (name,) = export.inputs
    found = _run(graph, {name: given.numpy()})
    return Criterion(
        name=export.name,
        says=f"relative distance of the {export.words}'s graph from torch",
        limit=_LIMIT,
        steps=(0,),
        per_step=(max(_distance(*pair, export.compared) for pair in zip(found, map(_numpy, wanted), strict=True)),),
    )


def _distance(found: NDArray[Any], wanted: NDArray[Any], parts: int) -> float:
    pairs = [(found, wanted)]
    if parts > 1:
        pairs = list(zip(*(np.split(each, parts, axis=1) for each in (found, wanted)), strict=True))
    return max(float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-12)) for one, other in pairs)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array


def _run(graph: GraphFile | ir.Model, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    with temporary_folder() as folder:
        session = open_graph(graph, Path(folder))
    results: list[NDArray[Any]] = session.run(None, feeds)
    return results
