"""What layers of diffusers' denoisers are called in the code that Stable Diffusion was first published with.

UNets: CompVis' and Stability's `openaimodel.py` (SD 1, 2, XL; "sgm" names). MMDiT: Stability's `mmdit.py` (SD 3), which
keeps queries, keys and values in one layer and has shift before scale in the last normalizations.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["mmdit_layers", "unet_name"]

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)"
)

_MMDIT_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_MMDIT_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}


def unet_name(path: str, unet: Any) -> str | None:
    """The original name of a layer of diffusers' UNet2DConditionModel; None for one that the original does not have."""
    if path in _UNET_ENDS:
        return _UNET_ENDS[path]
    found = _BLOCK.fullmatch(path)
    if found is None:
        return None
    side, block, kind, index, rest = found.groups()
    if kind == "resnets":
        rest = _RESNET.get(rest, rest)
    inner = 0 if kind == "resnets" else 1
    if side is None:
        place = f"middle_block.{2 * int(index) if inner == 0 else 1}"
    else:
        each = unet.config.layers_per_block + 1
        last = kind in ("downsamplers", "upsamplers")
        first = int(block) * each
        if side == "down":
            place = f"input_blocks.{first + each if last else 1 + first + int(index)}.{0 if last else inner}"
        else:
            behind = 2 if getattr(unet.up_blocks[int(block)], "attentions", None) else 1
            place = (
                f"output_blocks.{first + each - 1}.{behind}" if last else f"output_blocks.{first + int(index)}.{inner}"
            )
        if last:
            return f"{place}.op" if side == "down" else f"{place}.{rest}"
    return f"{place}.{rest}" if rest else place


def mmdit_layers(transformer: Any) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Original name -> (layers of diffusers' SD3Transformer2DModel whose rows follow each other in it, whether the
    halves of their rows are exchanged)."""
    last = len(transformer.transformer_blocks) - 1
    names: dict[str, tuple[tuple[str, ...], bool]]
    names = {original: ((path,), path == "norm_out.linear") for path, original in _MMDIT_ENDS.items()}
    for block in range(last + 1):
        for original, layers in _MMDIT_BLOCK.items():
            exchanged = block == last and original == "context_block.adaLN_modulation.1"
            paths = tuple(f"transformer_blocks.{block}.{layer}" for layer in layers)
            names[f"joint_blocks.{block}.{original}"] = paths, exchanged
    present = {name for name, _ in transformer.named_modules()}
    return {name: value for name, value in names.items() if present.issuperset(value[0])}
