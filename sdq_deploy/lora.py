"""LoRA adapters, fused into a copy of the model before anything else happens to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json, atomic_write_text, sha256_file

__all__ = ["Lora", "fuse_loras", "parse_lora"]

#: Written last, so that a copy that has it is whole.
_RECORD = "fused.json"


@dataclass(frozen=True)
class Lora:
    """An adapter file (.safetensors, as diffusers reads it) and the strength that it is fused with."""

    path: Path
    weight: float = 1.0


def parse_lora(text: str) -> Lora:
    """`FILE` or `FILE=WEIGHT`.

    Raises:
        SdqError: the weight is no number, or the file is missing or no safetensors.
    """
    name, _, number = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        lora = Lora(Path(name).expanduser(), float(number))
    except ValueError as error:
        raise SdqError(f"The weight {number!r} of the adapter {name} is no number.", "Write FILE=0.8.") from error
    if not lora.path.is_file():
        raise SdqError(f"The adapter {lora.path} does not exist.", "Give a .safetensors file, or FILE=WEIGHT.")
    if lora.path.suffix != ".safetensors":
        raise SdqError(f"The adapter {lora.path} is no .safetensors file; loading a pickle can run any code.")
    return lora


def fuse_loras(model: str | Path, revision: str | None, loras: Sequence[Lora], folder: Path) -> Path:
    """Write a copy of the model whose weights have the adapters in them, by diffusers' own loader.

    An existing copy of the same model and adapters is kept. Weights are stored as the model stores them.

    Args:
        model: a diffusers folder or a hub id.
        revision: of a hub model.
        loras: in the order in which they are fused.
        folder: becomes a diffusers folder.

    Raises:
        SdqError: peft is missing, the model cannot be loaded, or an adapter does not fit it.
    """
    from sdq_export.source import load_source

    source = load_source(model, revision)
    record = {
        "model": source.sha256,
        "loras": [{"sha256": sha256_file(lora.path), "weight": lora.weight} for lora in loras],
    }
    if _recorded(folder) == record:
        return folder
    (folder / _RECORD).unlink(missing_ok=True)
    pipeline = source.pipeline(source.scheduler)
    for lora in loras:
        _fuse(pipeline, lora)
    pipeline.to(dtype=_stored_dtype(source))
    pipeline.save_pretrained(folder, safe_serialization=True)
    _carry_papers(source.folder, folder, source.model, loras)
    atomic_write_json(folder / _RECORD, record)
    return folder


def _recorded(folder: Path) -> Any:
    try:
        return json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _fuse(pipeline: Any, lora: Lora) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise SdqError("Fusing a LoRA needs peft.", "pip install 'sdq-deploy[lora]'") from error
    try:
        pipeline.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, local_files_only=True)
        if not pipeline.get_active_adapters():
            raise ValueError("none of its tensors belongs to a layer of the model")
        pipeline.fuse_lora(lora_scale=lora.weight)
        pipeline.unload_lora_weights()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SdqError(f"The adapter {lora.path} does not fit the model: {reason}") from error


def _stored_dtype(source: Any) -> Any:
    """The dtype of the denoiser's weights on disk."""
    import torch
    from safetensors import safe_open

    file = next(iter(sorted((source.folder / source.family.denoiser).glob("*.safetensors"))))
    with safe_open(file, "pt") as opened:
        dtype = opened.get_slice(next(iter(opened.keys()))).get_dtype()
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32)


def _carry_papers(source: Path, folder: Path, model: str, loras: Sequence[Lora]) -> None:
    """Licence and model card go along, and a notice says what was changed."""
    for name in (*(path.name for path in source.glob("LICENSE*")), "README.md"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    own = source / "NOTICE"
    carried = own.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if own.is_file() else ""
    names = ", ".join(f"{lora.path.name} ({lora.weight:g})" for lora in loras)
    atomic_write_text(folder / "NOTICE", f"{carried}{model} with LoRA adapters fused into its weights: {names}.\n")
