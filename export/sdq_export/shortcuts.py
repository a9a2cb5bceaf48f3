"""Shortcut splitting: the two halves of a concatenated skip input get scales of their own.

In a UNet's up path a ResNet block reads the concatenation of the hidden state and a skip connection, and its 1x1
shortcut convolution reads it raw. The two halves differ in range, so one scale serves neither (Li et al.,
"Q-Diffusion", ICCV 2023, section 3.3). A 1x1 convolution of a concatenation is the sum of one convolution each:

    W [a; b] + c = W_a a + (W_b b + c)

so the layer is replaced by two, before anything is quantized. Each is then a site like any other: its own weight and
activation scales, its own INT8 kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.skeleton import copy_module, is_hollow_tensor

__all__ = ["SplitShortcut", "split_shortcuts"]


class SplitShortcut(nn.Module):
    """A shortcut convolution of a concatenation as two convolutions.

    Args:
        whole: the convolution of both halves; its weights are copied.
        hidden: channels of the first half, the hidden state; the rest is the skip connection.
    """

    def __init__(self, whole: nn.Conv2d, hidden: int) -> None:
        super().__init__()
        self.widths = [hidden, whole.in_channels - hidden]
        self.hidden, self.skip = _part(whole, slice(0, hidden)), _part(whole, slice(hidden, None))
        self.hidden.bias = None

    def forward(self, joined: Tensor) -> Tensor:
        """f32 [B, hidden + skip, h, w] to [B, C_out, h, w]."""
        hidden, skip = torch.split(joined, self.widths, dim=1)
        total: Tensor = self.hidden(hidden) + self.skip(skip)
        return total


def split_shortcuts(unet: nn.Module) -> nn.Module:
    """A copy of a UNet2DConditionModel whose up path has its shortcuts split; it computes the same function.

    Layers `<block>.conv_shortcut` become `<block>.conv_shortcut.hidden` and `<block>.conv_shortcut.skip`, which has the
    bias. Blocks without a shortcut convolution stay as they are.

    Raises:
        SdqError: the denoiser is no UNet.
    """
    if not hasattr(unet, "up_blocks"):
        raise SdqError(
            f"split_shortcuts is for UNets; a {type(unet).__name__} has no shortcuts.",
            "Leave it out: --set quantization.split_shortcuts=false",
        )
    result = copy_module(unet)
    channels = int(result.mid_block.resnets[-1].out_channels)
    for up_block in result.up_blocks:
        for block in up_block.resnets:
            if block.conv_shortcut is not None:
                block.conv_shortcut = SplitShortcut(block.conv_shortcut, channels)
            channels = int(block.out_channels)
    return result


def _part(whole: nn.Conv2d, channels: slice) -> nn.Conv2d:
    part = copy_module(whole)
    weight = whole.weight[:, channels]
    weight = weight if is_hollow_tensor(weight) else weight.clone()
    part.weight = nn.Parameter(weight, requires_grad=whole.weight.requires_grad)
    part.in_channels = part.weight.shape[1]
    return part
