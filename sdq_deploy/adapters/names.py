"""Which layer of a model a name in an adapter's file means, in every spelling that tools write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from sdq_deploy.adapters.original_names import mmdit_layers, unet_name
from sdq_export.sketch import Sketch
from sdq_export.source import Source

__all__ = ["Layer", "layer_names", "split_key"]

#: How a key ends -> what the tensor is to its layer. Longer endings first, for some end on others.
_ENDINGS = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "bias_diff",
    ".b_norm": "bias_diff",
    **{f".hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{role}": f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
#: diffusers' first attention processors named their own parts, not the model's layers.
_PROCESSOR = re.compile(r"\.(?:processor\.)?to_out$")


@dataclass(frozen=True)
class Layer:
    """What of a model a name means: rows of `paths` one after the other, in the part (folder) `part`.

    With `exchanged` the two halves of the rows are in the other order in the adapter.
    """

    part: str
    paths: tuple[str, ...]
    exchanged: bool = False


def split_key(key: str) -> tuple[str, str] | None:
    """(the layer's name, the tensor's role) of a key; None for a tensor of no known kind."""
    for ending, role in _ENDINGS.items():
        if key.endswith(ending):
            name = key[: -len(ending)]
            if ending.startswith("_lora"):
                name = _PROCESSOR.sub(".to_out.0", name).replace(".processor.", ".")
            return name, role
    return None


def layer_names(source: Source) -> dict[str, Layer]:
    """Every spelling of every layer that has a weight: of diffusers, peft, kohya, LyCORIS and the original code."""
    names: dict[str, Layer] = {}
    hollow = Sketch(source.folder, source.model, source.revision)
    for part in (source.family.denoiser, *(encoder.component for encoder in source.family.text_encoders)):
        with torch.device("meta"):  # shapes alone, no memory
            model = hollow.part(part)
        spell = _denoiser_spellings if part == source.family.denoiser else _encoder_spellings
        for path, module in model.named_modules():
            if path and getattr(module, "weight", None) is not None:
                for name in spell(part, path, model):
                    names.setdefault(name, Layer(part, (path,)))
        if part == "transformer":
            for original, (paths, exchanged) in mmdit_layers(model).items():
                for name in _original_spellings(original):
                    names.setdefault(name, Layer(part, paths, exchanged))
    return names


def _denoiser_spellings(part: str, path: str, model: Any) -> list[str]:
    flat = _flat(path)
    names = [f"{part}.{path}", path, f"base_model.model.{path}", f"{part}.base_model.model.{path}"]
    names += [f"lora_unet_{flat}", f"lora_{part}_{flat}", f"lycoris_{flat}"]
    original = unet_name(path, model) if part == "unet" else None
    return names if original is None else [*names, *_original_spellings(original)]


def _original_spellings(original: str) -> list[str]:
    return [f"lora_unet_{_flat(original)}", f"lycoris_{_flat(original)}", f"diffusion_model.{original}", original]


def _encoder_spellings(part: str, path: str, model: Any) -> list[str]:
    number = part.rpartition("_")[2] if part[-1].isdigit() else "1"
    prefixes = [f"lora_te{number}_", *(["lora_te_"] if number == "1" else [])]
    inner = path.removeprefix("text_model.")
    paths = [path, *(["text_model." + path] if inner == path else [inner])]
    for name, original in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out.0")):
        paths += [each.removesuffix(name) + original for each in paths[:2] if each.endswith("self_attn." + name)]
    return [
        *(f"{part}.{each}" for each in paths),
        *(f"{part}.base_model.model.{each}" for each in paths),
        *(f"{prefix}{_flat(each)}" for each in paths for prefix in prefixes),
    ]


def _flat(path: str) -> str:
    return path.replace(".", "_")
