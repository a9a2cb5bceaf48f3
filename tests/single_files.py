"""Whole models in one file, as WebUIs have them, written from diffusers folders by the original code's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

_RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
_UNET = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
_VAE = [
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
]
_OPEN_CLIP = [
    ("text_model.", ""),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers", "transformer.resblocks"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("final_layer_norm", "ln_final"),
]


def part_state(folder: Path) -> State:
    """A part's tensors."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def original_state(kind: str, folder: Path) -> State:
    """The tensors of a tiny checkpoint "sd", "sd-inpainting", "sd2", "sdxl" or "sd3" by the original names."""
    state = {f"first_stage_model.{key}": value for key, value in vae_state(part_state(folder / "vae")).items()}
    if kind == "sd3":
        state |= _prefixed("model.diffusion_model.", mmdit_state(part_state(folder / "transformer")))
        for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
            state |= _prefixed(f"text_encoders.{name}.transformer.", part_state(folder / part))
        return state
    state |= _prefixed("model.diffusion_model.", unet_state(part_state(folder / "unet")))
    first = part_state(folder / "text_encoder")
    wrapped = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in first.items()}
    if kind == "sdxl":
        state |= _prefixed("conditioner.embedders.0.transformer.", wrapped)
        state |= _prefixed("conditioner.embedders.1.model.", open_clip_state(part_state(folder / "text_encoder_2")))
    elif kind == "sd2":
        state |= _prefixed("cond_stage_model.model.", _with_last_layer(open_clip_state(first)))
    else:
        state |= _prefixed("cond_stage_model.transformer.", wrapped)
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    return state


def write_file(state: State, path: Path, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Path:
    """Write tensors as one file; `convert` changes those in floating point."""
    save_file({key: (convert(v) if v.is_floating_point() else v).contiguous() for key, v in state.items()}, path)
    return path


def unet_state(state: State, each: int = 2) -> State:
    """A UNet's tensors by the original names; `each` input blocks a level, for one resnet a level two."""
    pairs = list(_UNET)
    for level in range(3):
        for index in range(each):
            first = level * each + index
            attention = f"up_blocks.{level}.attentions.0.norm.weight" in state
            pairs += [
                (f"up_blocks.{level}.resnets.{index}", f"output_blocks.{first}.0"),
                (f"up_blocks.{level}.attentions.{index}", f"output_blocks.{first}.1"),
                (f"up_blocks.{level}.upsamplers.0", f"output_blocks.{(level + 1) * each - 1}.{2 if attention else 1}"),
                (f"down_blocks.{level}.resnets.{index}", f"input_blocks.{first + 1}.0"),
                (f"down_blocks.{level}.attentions.{index}", f"input_blocks.{first + 1}.1"),
                (f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(level + 1) * each}.0.op"),
            ]
    middle = [("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1")]
    pairs += [*middle, ("mid_block.resnets.1", "middle_block.2")]
    return {_named(key, pairs, _RESNET if ".resnets." in key else []): value for key, value in state.items()}


def vae_state(state: State) -> State:
    """A VAE's tensors by the original names; attention's matrices are 1x1 convolutions there."""
    pairs = list(_VAE)
    for level in range(4):
        for side, own in (("down", level), ("up", 3 - level)):
            pairs += [
                (f"{side}_blocks.{level}.{side}samplers.0.conv", f"{side}.{own}.{side}sample.conv"),
                *((f"{side}_blocks.{level}.resnets.{j}", f"{side}.{own}.block.{j}") for j in range(3)),
            ]
    return {
        _named(key, pairs, _VAE): value[:, :, None, None]
        if "mid_block.attentions.0.to_" in key and value.ndim == 2
        else value
        for key, value in state.items()
    }


def open_clip_state(state: State) -> State:
    """A text encoder's tensors by OpenCLIP's names: queries, keys, values in one, the projection transposed."""
    made: State = {}
    for key, value in state.items():
        name = _named(key, [], _OPEN_CLIP)
        if key.endswith(("self_attn.q_proj.weight", "self_attn.q_proj.bias")):
            ending = key.rpartition(".")[2]
            three = [state[key.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            made[name.replace(f"self_attn.q_proj.{ending}", f"attn.in_proj_{ending}")] = torch.cat(three)
        elif key == "text_projection.weight":
            made["text_projection"] = value.T
        elif "k_proj" not in key and "v_proj" not in key:
            made[name] = value
    return made


def mmdit_state(state: State) -> State:
    """An MMDiT's tensors by Stability's names: queries, keys and values in one, shift before scale at the end."""
    simple = [
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        ("proj_out", "final_layer.linear"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("transformer_blocks.", "joint_blocks."),
        ("attn.to_out.0", "x_block.attn.proj"),
        ("attn.to_add_out", "context_block.attn.proj"),
        ("norm1_context.linear", "context_block.adaLN_modulation.1"),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
    ]
    last = max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    made: State = {}
    for key, value in state.items():
        if ".attn.to_q." in key:
            three = [state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")]
            made[_named(key, [], simple).replace("attn.to_q", "x_block.attn.qkv")] = torch.cat(three)
        elif ".attn.add_q_proj." in key:
            three = [state[key.replace("add_q_proj", name)] for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
            made[_named(key, [], simple).replace("attn.add_q_proj", "context_block.attn.qkv")] = torch.cat(three)
        elif not any(name in key for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")):
            exchanged = key.startswith((f"transformer_blocks.{last}.norm1_context", "norm_out"))
            made[_named(key, [], simple)] = torch.cat(value.chunk(2)[::-1]) if exchanged else value
    return made


def _named(key: str, starts: list[tuple[str, str]], inner: list[tuple[str, str]]) -> str:
    """The key with its longest known beginning (or part) replaced, then what is inside a block."""
    for name, original in sorted(starts, key=lambda pair: -len(pair[0])):
        if f".{name}." in f".{key}":
            key = f".{key}".replace(f".{name}.", f".{original}.", 1)[1:]
            break
    for name, original in inner:
        if name in key:
            key = key.replace(name, original, 1)
    return key


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def _with_last_layer(state: State) -> State:
    """Stable Diffusion 2's files keep the layer that its text encoder stops before."""
    layers = [int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks.")]
    last = f"transformer.resblocks.{max(layers)}."
    more = {
        key.replace(last, f"transformer.resblocks.{max(layers) + 1}."): v.clone()
        for key, v in state.items()
        if last in key
    }
    return {**state, **more, "logit_scale": torch.tensor(1.0), "text_projection": torch.zeros(32, 32)}
