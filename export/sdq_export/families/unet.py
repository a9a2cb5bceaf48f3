"""What the families with a UNet2DConditionModel share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from sdq_engines.errors import SdqError
from sdq_export.capture import FreeSize, capture
from sdq_export.families.network import Network
from sdq_export.inpainting import extra_channels
from sdq_export.sizes import HEIGHT, WIDTH, different

__all__ = [
    "UNet",
    "capture_unet",
    "check_conditions",
    "is_unet",
]

_TIME_PATH = ("time_proj", "time_embedding", "time_emb_proj", "add_time_proj", "add_embedding")
_CONDITIONS = (
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "num_class_embeds",
)


class UNet(Network):
    """diffusers' UNet2DConditionModel; what a family's time path differs in is left to it."""

    blocks = ("ResnetBlock2D", "Transformer2DModel")

    def extra_channels(self, denoiser: nn.Module) -> int:
        return extra_channels(denoiser)

    def latent_multiple(self, denoiser: nn.Module) -> int:
        """Every level but the last halves height and width."""
        config: Any = denoiser.config
        return int(2 ** (len(config.block_out_channels) - 1))

    def quantizable_layers(self, denoiser: nn.Module) -> dict[str, str]:
        """Left out are the time path (precomputed) and the keys and values of cross-attention (by the prologue).

        Query, key and value of a self-attention read the same tensor, named after the attention.
        """
        return {
            layer: _input_tensor(denoiser, layer)
            for layer, module in denoiser.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and not _precomputed(denoiser, layer)
        }


def is_unet(denoiser: nn.Module) -> bool:
    """Whether it is diffusers' conditional UNet."""
    from diffusers import UNet2DConditionModel

    return isinstance(denoiser, UNet2DConditionModel)


def check_conditions(unet: nn.Module, allowed: Mapping[str, str | None] | None = None) -> None:
    """Refuse, by name, a UNet whose time path is more than its family knows.

    Args:
        unet: diffusers' UNet2DConditionModel.
        allowed: config key -> the value that the family supports; None, the default, for every other.

    Raises:
        SdqError: class or image embeddings, other added conditions, or another time embedding norm than "default".
    """
    config: Any = unet.config
    for key in _CONDITIONS:
        if getattr(config, key, None) != (allowed or {}).get(key):
            raise SdqError(
                f"The denoiser's {key}={getattr(config, key)!r} mixes a condition into the time path, "
                "which this version does not support.",
                "Supported are UNets of the form of Stable Diffusion 1 and 2, and of Stable Diffusion XL.",
            )
    for name, module in unet.named_modules():
        kind = getattr(module, "time_embedding_norm", "default")
        if kind != "default":
            raise SdqError(f"The block {name} has time_embedding_norm={kind!r}; only 'default' is supported.")


def _precomputed(unet: nn.Module, layer: str) -> bool:
    owner, _, part = layer.rpartition(".")
    if any(name in _TIME_PATH for name in layer.split(".")):
        return True
    return part in ("to_k", "to_v") and _is_cross_attention(unet.get_submodule(owner))


def _input_tensor(unet: nn.Module, layer: str) -> str:
    owner, _, part = layer.rpartition(".")
    shares = part in ("to_q", "to_k", "to_v") and not _is_cross_attention(unet.get_submodule(owner))
    return owner if shares else layer


def _is_cross_attention(module: Any) -> bool:
    return bool(getattr(module, "is_cross_attention", False))


def capture_unet(
    unet: nn.Module,
    latent_shape: tuple[int, int, int],
    prompts: Mapping[str, Any],
    names: Sequence[str],
    multiple: int = 0,
) -> ir.Model:
    """A UNet's graph; see `Network.capture`.

    Args:
        unet: diffusers' UNet2DConditionModel.
        latent_shape: C, h, w.
        prompts: argument of the forward -> an example of two prompts, or a dict of them.
        names: what these tensors are called in the graph, in order.
        multiple: of a free height and width; 0 for those of `latent_shape`.
    """
    config: Any = unet.config
    sample = torch.randn(2, config.in_channels, *different(latent_shape[1:], multiple))
    return capture(
        unet,
        {"sample": sample, "timestep": torch.tensor(1.0), **prompts},
        input_names=["sample", "timestep", *names],
        batched=["sample", *prompts],
        outputs=["model_output"],
        batch="2*batch",
        static={"return_dict": False},
        sized=FreeSize("sample", multiple, (HEIGHT, WIDTH)) if multiple else None,
    )
