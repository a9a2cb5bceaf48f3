"""Factors on the channels of a layer's input, folded into what comes before: the network computes what it did.

SmoothQuant (Xiao et al., 2023) and AWQ (Lin et al., 2024) divide an input's channels by factors and multiply the
weight's columns by them: (X / f)(f W) = X W. The division costs nothing where a normalization's affine parameters, or
the rows of a linear layer before, can take it. Where that is in a denoiser of Stable Diffusion's form:

1. query, key and value of a self-attention, query of a cross-attention, the feed-forward's first layer: the LayerNorm;
2. an attention's output projection: the rows of its value projection, for attention mixes tokens, not channels;
3. the feed-forward's second layer, behind a GEGLU: the rows of the first layer's half that is not gated;
4. the projection into a transformer: the GroupNorm.

Elsewhere a SiLU or a residual sum stands between (the ResNet blocks, the projection out of a transformer, down- and
upsampling): those layers stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.training.balance import column_peaks, log_balance
from sdq_export.quantspec import QuantSpec

__all__ = ["FoldPoint", "find_fold_points", "fold_factors", "smoothquant_factors"]

#: Bounds of a factor, those of ModelOpt.
_LEAST, _MOST = 1e-4, 1e4


@dataclass(frozen=True)
class FoldPoint:
    """A tensor whose channels can be scaled.

    Attributes:
        readers: the layers that read it, all of them weight sites.
        producer: the module whose output it is, up to what commutes with a factor per channel.
        rows: how many of the producer's first output channels it is; None for all.
    """

    readers: tuple[str, ...]
    producer: str
    rows: int | None = None


def find_fold_points(unet: nn.Module, spec: QuantSpec) -> list[FoldPoint]:
    """The four cases, where every reader is a weight site."""
    sites = spec.weight_sites
    points: list[FoldPoint] = []
    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "BasicTransformerBlock":
            points += _of_transformer_block(name, module)
        elif kind == "Transformer2DModel" and isinstance(getattr(module, "norm", None), nn.GroupNorm):
            points.append(FoldPoint((f"{name}.proj_in",), f"{name}.norm"))
    return [point for point in points if all(reader in sites for reader in point.readers)]


def _of_transformer_block(name: str, block: Any) -> Iterator[FoldPoint]:
    for attention, norm in (("attn1", "norm1"), ("attn2", "norm2")):
        module = getattr(block, attention, None)
        if module is None:
            continue
        # Case 1; the text's keys and values read another tensor.
        own = ("to_q",) if module.is_cross_attention else ("to_q", "to_k", "to_v")
        if _affine(getattr(block, norm, None)):
            yield FoldPoint(tuple(f"{name}.{attention}.{layer}" for layer in own), f"{name}.{norm}")
        yield FoldPoint((f"{name}.{attention}.to_out.0",), f"{name}.{attention}.to_v")  # case 2
    if _affine(getattr(block, "norm3", None)):
        yield FoldPoint((f"{name}.ff.net.0.proj",), f"{name}.norm3")  # case 1
    if type(block.ff.net[0]).__name__ == "GEGLU":
        yield FoldPoint((f"{name}.ff.net.2",), f"{name}.ff.net.0.proj", block.ff.net[2].in_features)  # case 3


def _affine(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.elementwise_affine


@torch.no_grad()
def fold_factors(unet: nn.Module, factors: Mapping[FoldPoint, Tensor]) -> nn.Module:
    """A copy of the UNet that divides each point's channels by its factors, f32 [C] positive, and computes the same."""
    folded = copy.deepcopy(unet)
    for point, factor in factors.items():
        producer = folded.get_submodule(point.producer)
        for parameter in (producer._parameters["weight"], producer._parameters.get("bias")):
            if parameter is not None:
                part = parameter[: point.rows]
                part.div_(factor.to(part).reshape(-1, *[1] * (part.ndim - 1)))
        for reader in point.readers:
            weight = folded.get_parameter(f"{reader}.weight")
            weight.mul_(factor.to(weight).reshape(1, -1, *[1] * (weight.ndim - 2)))
    return folded


@torch.no_grad()
def smoothquant_factors(
    unet: nn.Module, points: Sequence[FoldPoint], largest: Mapping[FoldPoint, Tensor], alpha: float
) -> dict[FoldPoint, Tensor]:
    """SmoothQuant's factors, one strength for all points; see `log_balance`.

    Args:
        unet: floating point.
        points: where.
        largest: the largest magnitude of each input channel, f32 [C].
        alpha: migration strength; 1 evens out the inputs, 0 the weights.
    """
    factors = {}
    for point in points:
        heights = column_peaks(unet.get_parameter(f"{reader}.weight") for reader in point.readers)
        logs, _ = log_balance(largest[point].to(heights), heights, alpha)
        factors[point] = logs.exp().clamp(_LEAST, _MOST)
    return factors
