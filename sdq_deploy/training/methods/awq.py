"""AWQ: weight-only quantization that protects the channels whose inputs are large.

After Lin et al., "AWQ: Activation-aware Weight Quantization" (2024): per tensor, factors f = mean|X|^a on the input's
channels, a searched for the least squared error of the readers' outputs (equations 4 and 5); then, per block of a
weight, a range clipped as far as lowers that error. Errors are computed from X^T X alone:
||X (W_hat - W)^T||^2 = tr((W_hat - W) X^T X (W_hat - W)^T).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdq_deploy.training.methods.activation_statistics import ChannelStatistics
from sdq_deploy.training.methods.smoothing import FoldPoint
from sdq_deploy.training.search import max_scale
from sdq_export.checkpoint import dequantize_weight, quantize_weight
from sdq_export.quantspec import WeightSite

__all__ = ["awq_factors", "clipped_scale", "output_error"]

#: The narrowest range that is tried is half the largest magnitude, as in the authors' code.
_SHRINKAGES = tuple(1 - step / 20 for step in range(11))


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared error of each output channel, [C_out]: the diagonal of D X^T X D^T.

    Args:
        difference: D = W_hat - W, f32 [C_out, C_in].
        gram: X^T X, f32 [C_in, C_in].
    """
    return ((difference @ gram) * difference).sum(dim=1)


@torch.no_grad()
def awq_factors(
    unet: nn.Module, point: FoldPoint, sites: Mapping[str, WeightSite], inputs: ChannelStatistics, points: int
) -> Tensor:
    """The factors of a point whose readers are Linear, f32 [C_in], of geometric middle 1.

    Args:
        unet: floating point.
        point: where.
        sites: weight sites by layer.
        inputs: of the tensor, with X^T X.
        points: candidates for the exponent, k / points for k = 0..points-1; the first does nothing.
    """
    assert inputs.gram is not None
    best, least = torch.ones_like(inputs.mean), float("inf")
    for step in range(points):
        factor = inputs.mean.clamp_min(1e-4).pow(step / points)
        factor = factor / (factor.max() * factor.min()).sqrt()
        error = 0.0
        for reader in point.readers:
            weight, site = unet.get_parameter(f"{reader}.weight").detach().to(inputs.gram), sites[reader]
            error += float(output_error(_rounded(weight * factor, site) / factor - weight, inputs.gram).sum())
        if error < least:
            best, least = factor, error
    return best


def _rounded(weight: Tensor, site: WeightSite) -> Tensor:
    scale = _widest(weight, site)
    return dequantize_weight(quantize_weight(weight, scale, site), scale, site)


def _widest(weight: Tensor, site: WeightSite) -> Tensor:
    """The scale that just holds the largest magnitude, [C_out] or [C_out, blocks]."""
    blocks = weight.reshape(len(weight), -1, site.format.block_size or weight.shape[1])
    scale = max_scale(blocks.abs().amax(dim=2), site.format)
    return scale if site.format.block_size is not None else scale[:, 0]


@torch.no_grad()
def clipped_scale(weight: Tensor, site: WeightSite, gram: Tensor) -> Tensor:
    """Scales [C_out] or [C_out, blocks] of a Linear: of least output error, every block judged by itself.

    Args:
        weight: f32 [C_out, C_in].
        site: its format.
        gram: X^T X of its input, f32 [C_in, C_in].
    """
    width = site.format.block_size or weight.shape[1]
    count = weight.shape[1] // width
    own = gram.reshape(count, width, count, width)[torch.arange(count), :, torch.arange(count)]
    widest = _widest(weight, site)
    best, least = widest, torch.full((len(weight), count), float("inf"), device=weight.device)
    for shrinkage in _SHRINKAGES:
        scale = widest * shrinkage
        difference = dequantize_weight(quantize_weight(weight, scale, site), scale, site) - weight
        parts = difference.reshape(len(weight), count, width)
        error = torch.einsum("obi,bij,obj->ob", parts, own, parts)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better.reshape(best.shape), scale, best)
    return best
