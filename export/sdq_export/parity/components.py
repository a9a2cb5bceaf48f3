"""Parity of the components that are not quantized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_export.families.base import TextEncoder
from sdq_export.parity.graphs import GraphFile, open_graph
from sdq_export.parity.report import Criterion
from sdq_export.scratch import temporary_folder
from sdq_export.source import Source

__all__ = ["check_text_encoder", "check_vae_decoder", "check_vae_encoder"]

_LIMIT = 1e-4


def check_text_encoder(
    graph: GraphFile | ir.Model, module: nn.Module, source: Source, encoder: TextEncoder, prompts: Sequence[str]
) -> Criterion:
    """A text encoder's graph against torch, on the prompts and the empty one; the worst of its outputs."""
    tokens = encoder.token_ids(source, ["", *prompts])
    with torch.no_grad():
        wanted = [output.numpy() for output in module(tokens)]
    return _criterion(encoder.component, _run(graph, {"input_ids": tokens.numpy()}), wanted)


def check_vae_decoder(
    graph: GraphFile | ir.Model, module: nn.Module, latents: Tensor, images: Tensor | None = None
) -> Criterion:
    """The decoder's graph against torch, on latents [n, C, h, w]; `images` are what torch makes of them, if known."""
    with torch.no_grad():
        wanted = module(latents) if images is None else images
    return _criterion("vae_decoder", _run(graph, {"latents": latents.numpy()}), [wanted.numpy()])


def check_vae_encoder(graph: GraphFile | ir.Model, module: nn.Module, images: Tensor) -> Criterion:
    """The encoder's graph against torch, mean and standard deviation each, on a decoder's images [n, 3, H, W]."""
    with torch.no_grad():
        given = 2 * images - 1
        wanted = module(given).numpy()
    found = _run(graph, {"images": given.numpy()})[0]
    return _criterion("vae_encoder", np.split(found, 2, axis=1), np.split(wanted, 2, axis=1))


def _run(graph: GraphFile | ir.Model, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    with temporary_folder() as folder:
        session = open_graph(graph, Path(folder))
    results: list[NDArray[Any]] = session.run(None, feeds)
    return results


def _criterion(name: str, found: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]]) -> Criterion:
    distance = max(
        float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-12))
        for one, other in zip(found, wanted, strict=True)
    )
    return Criterion(
        name=name,
        says=f"relative distance of the {name.replace('_', ' ')}'s graph from torch",
        limit=_LIMIT,
        steps=(0,),
        per_step=(distance,),
    )
