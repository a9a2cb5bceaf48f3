"""Parity of the components that are not quantized."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_export.parity.graphs import open_graph
from sdq_export.parity.report import Criterion
from sdq_export.vae_encoder import VaeEncoder

__all__ = ["check_text_encoder", "check_vae_decoder", "check_vae_encoder"]

_LIMIT = 1e-4


def check_text_encoder(graph: ir.Model, text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Criterion:
    """The text encoder's graph against torch, on the prompts and the empty one."""
    tokens = tokenizer(
        ["", *prompts], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    with torch.no_grad():
        wanted = text_encoder(tokens, return_dict=False)[0].numpy()
    return _criterion("text_encoder", _run(graph, {"input_ids": tokens.numpy()}), wanted)


def check_vae_decoder(graph: ir.Model, vae: Any, latents: Tensor) -> Criterion:
    """The decoder's graph against torch, on latents [n, C, h, w]."""
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    wanted = (decoded / 2 + 0.5).clamp(0, 1).numpy()
    return _criterion("vae_decoder", _run(graph, {"latents": latents.numpy()}), wanted)


def check_vae_encoder(graph: ir.Model, vae: Any, latents: Tensor) -> Criterion:
    """The encoder's graph against torch, mean and standard deviation each, on the images of latents [n, C, h, w]."""
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
        wanted = VaeEncoder(vae)(images).numpy()
    found = _run(graph, {"images": images.numpy()})
    halves = zip(np.split(found, 2, axis=1), np.split(wanted, 2, axis=1), strict=True)
    return max((_criterion("vae_encoder", *half) for half in halves), key=lambda criterion: criterion.worst)


def _run(graph: ir.Model, feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
    with tempfile.TemporaryDirectory(prefix="sdq-parity-", ignore_cleanup_errors=True) as folder:
        session = open_graph(graph, Path(folder))
    result: NDArray[Any] = session.run(None, feeds)[0]
    return result


def _criterion(name: str, found: NDArray[Any], wanted: NDArray[Any]) -> Criterion:
    distance = float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))
    return Criterion(
        name=name,
        says=f"relative distance of the {name.replace('_', ' ')}'s graph from torch",
        limit=_LIMIT,
        steps=(0,),
        per_step=(distance,),
    )
