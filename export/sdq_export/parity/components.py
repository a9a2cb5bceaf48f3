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

_LIMIT, _LIMIT_PIXELS = 1e-4, 512 * 512
"""A graph may be this far from torch; where images are larger, as much farther as ONNX Runtime's normalization is.

It adds up a group's numbers one after the other in FP32: a norm of 128 channels in 32 groups is 1e-5 off at 512x512
pixels and 8e-5 at 1024x1024, where torch is 6e-8 off at both (against FP64).
"""


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
        limit=_limit(given, *wanted),
        steps=(0,),
        per_step=(max(_distance(*pair, export.compared) for pair in zip(found, map(_numpy, wanted), strict=True)),),
    )


def _limit(*tensors: Tensor) -> float:
    """By the largest image [N, C, h, w] of them."""
    pixels = max((tensor.shape[-2] * tensor.shape[-1] for tensor in tensors if tensor.ndim == 4), default=0)
    return float(_LIMIT * max(1.0, pixels / _LIMIT_PIXELS) ** 1.5)


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
