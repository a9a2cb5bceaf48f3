"""Checkpoints of the four families, at full size or small, filled with seeded random weights.

    python -m sdq_deploy.random_checkpoints FOLDER --family sd14 --width 0.5 --latent-size 32 --thin

The architectures are the published configurations (`sdq_export/published/*.json`), the layout is diffusers' own, so
they are loaded by the code that loads real ones. Speed, size and memory do not depend on what the weights are; images
do, and are noise. Tokenizers know bytes and a few words, under CLIP's and T5's rules and special tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from sdq_export.published import published

FAMILIES = ("sd14", "sd21", "sdxl", "sd3")
DENOISERS = {"sd14": "unet", "sd21": "unet", "sdxl": "unet", "sd3": "transformer"}
T5 = ("text_encoder_3", "tokenizer_3")

Changes = Mapping[str, Mapping[str, Any]]
"""Component -> keys of its configuration that differ from the published one."""


def write_checkpoint(
    folder: Path,
    family: str,
    changes: Changes | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    variant: Literal["fp16"] | None = None,
    without: Collection[str] = T5,
    pipeline: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a whole checkpoint, one component after the other: memory holds the largest of them once, in `dtype`.

    Args:
        folder: becomes a diffusers folder of safetensors.
        family: one of FAMILIES.
        changes: what differs from the published configuration; "_class_name" of a scheduler may differ too.
        dtype: of the weights.
        variant: in the files' names, as hubs have it.
        without: components that the pipeline can do without; SD3's T5 by default.
        pipeline: diffusers' class, by default the published one; it must have the same components.
        seed: of the weights; each component has its own stream.
    """
    tree = published(family)
    parts: dict[str, Any] = {}
    for name, config in tree["components"].items():
        config |= (changes or {}).get(name, {})
        parts[name] = None if name in without else make_component(config)
    assembled = getattr(diffusers, pipeline or tree["pipeline"])(**parts, **tree["settings"])
    assembled.save_config(folder)
    del assembled
    for index, name in enumerate(list(parts)):
        part = parts.pop(name)
        if isinstance(part, nn.Module):
            filled: Any = randomize_(part, 1000 * seed + index, dtype)
            filled.save_pretrained(folder / name, safe_serialization=True, variant=variant)
        elif part is not None:
            part.save_pretrained(folder / name)
    return folder


def write_sd14(folder: Path, width: float = 1.0, latent_size: int = 64, seed: int = 0) -> Path:
    """A checkpoint whose denoiser has SD v1-4's shape; its text encoder and autoencoder are thin. FP16 safetensors.

    Args:
        folder: becomes a diffusers folder.
        width: of the UNet, relative to the published one.
        latent_size: latents are latent_size x latent_size.
        seed: of the weights.
    """
    changes = scaled("sd14", width, latent_size, thin=True)
    return write_checkpoint(folder, "sd14", changes, dtype=torch.float16, seed=seed)


def scaled(family: str, width: float = 1.0, latent_size: int | None = None, thin: bool = False) -> Changes:
    """What to change for a denoiser of another width and latents of another size.

    Args:
        family: one of FAMILIES.
        width: factor of every channel count; it must leave them divisible by their norm groups.
        latent_size: latents are latent_size x latent_size; None is the published size.
        thin: text encoders of two layers, their width unchanged, and a narrow autoencoder.
    """
    components, denoiser = published(family)["components"], DENOISERS[family]
    changes: dict[str, dict[str, Any]] = {name: {} for name in components}
    config = components[denoiser]
    if family == "sd3":
        changes[denoiser] |= {
            "num_attention_heads": int(config["num_attention_heads"] * width),
            "caption_projection_dim": int(config["caption_projection_dim"] * width),
        }
    else:
        changes[denoiser]["block_out_channels"] = [int(size * width) for size in config["block_out_channels"]]
    if latent_size is not None:
        changes[denoiser]["sample_size"], changes["vae"]["sample_size"] = latent_size, 8 * latent_size
    if thin:
        changes["vae"] |= {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8}
        for name in (name for name in components if name.startswith("text_encoder")):
            changes[name]["num_layers" if name == "text_encoder_3" else "num_hidden_layers"] = 2
    return changes


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0, dtype: torch.dtype | None = None) -> nn.Module:
    """Fill a model, made with or without memory for its parameters, with seeded random weights, in place.

    Matrices have the standard deviation of torch's own initialization, biases and normalizations are random too (ones
    and zeros hide errors that cancel), and adaptive normalizations modulate by amounts that matter.

    Args:
        model: parameters shared by several modules stay shared.
        seed: of one generator for the whole model.
        dtype: of parameters and buffers; None keeps theirs.
    """
    generator, made = torch.Generator().manual_seed(seed), {}
    for path, module in model.named_modules():
        parent = type(model.get_submodule(path.rpartition(".")[0])).__name__
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in made:
                filled = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                mean, deviation = _moments(module, name, filled, parent.startswith("AdaLayerNorm"))
                # the old parameter is kept beside the new one, so that its id is not given to another
                made[id(parameter)] = parameter, nn.Parameter(filled.normal_(mean, deviation, generator=generator))
            if parameter is not None:
                module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if dtype is not None and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model.eval().requires_grad_(False)


def _moments(module: nn.Module, name: str, parameter: Tensor, modulation: bool) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's values."""
    if "Norm" in type(module).__name__:
        return (1.0 if name == "weight" else 0.0), 0.2
    if parameter.ndim < 2:
        return 0.0, 0.5 if modulation else 0.1
    if isinstance(module, nn.Embedding):
        return 0.0, 0.5
    return 0.0, (3 * parameter[0].numel()) ** -0.5


def clip_tokenizer(max_length: int = 77, pad_token: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """CLIP's byte-level tokenizer with the 512 byte symbols, a few merges, and no words beyond."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["r e", "re d</w>", "c i", "ci r", "cir c", "l e</w>", "circ le</w>"]
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(merge.split()) for merge in merges]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=max_length, pad_token=pad_token)


def t5_tokenizer(max_length: int = 512) -> transformers.T5Tokenizer:
    """T5's unigram tokenizer over printable ASCII and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, *("▁" + letter for letter in letters), "▁red", "▁circle", "▁a", "ing"]
    scores = {piece: -5.0 + len(piece) / 2 for piece in pieces}
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *scores.items()]
    return transformers.T5Tokenizer(vocab=vocabulary, model_max_length=max_length)


def make_component(config: Mapping[str, Any]) -> Any:
    """A component of its configuration; models without memory for their parameters."""
    settings = copy.deepcopy(dict(config))
    library, name = settings.pop("_class_name")
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if name == "CLIPTokenizer":
        return clip_tokenizer(settings["model_max_length"], settings["pad_token"])
    if name.startswith("T5Tokenizer"):
        return t5_tokenizer(settings["model_max_length"])
    if name.endswith("Scheduler"):
        return kind.from_config(settings)
    with init_empty_weights(include_buffers=False):
        if library == "diffusers":
            return kind(**settings)
        model = kind(kind.config_class(**settings))
    model.tie_weights()  # making it without memory has untied T5's two names of one embedding
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd14")
    parser.add_argument("--width", type=float, default=1.0, help="of the denoiser, relative to the published one")
    parser.add_argument("--latent-size", type=int, help="latents are this many pixels high and wide")
    parser.add_argument("--thin", action="store_true", help="text encoders of two layers and a narrow autoencoder")
    parser.add_argument("--t5", action="store_true", help="SD3 with its third text encoder, 4.7 billion parameters")
    parser.add_argument("--fp32", action="store_true", help="FP32 weights instead of FP16")
    parser.add_argument("--variant", choices=["fp16"], help="write *.fp16.safetensors, as hubs have them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    written = write_checkpoint(
        arguments.folder,
        arguments.family,
        scaled(arguments.family, arguments.width, arguments.latent_size, arguments.thin),
        dtype=torch.float32 if arguments.fp32 else torch.float16,
        variant=arguments.variant,
        without=() if arguments.t5 else T5,
        seed=arguments.seed,
    )
    print(written)


if __name__ == "__main__":
    main()
