"""Adapters (LoRA, DoRA, LyCORIS), fused into a copy of the model before anything else happens to it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.files import sha256_file

__all__ = ["Lora", "fuse_loras", "parse_lora"]


@dataclass(frozen=True)
class Lora:
    """An adapter's .safetensors file and the strength that it is fused with."""

    path: Path
    weight: float = 1.0
    recorded: str | None = None
    """The file's SHA-256 when it was fused, where it need not be there any more."""

    @property
    def sha256(self) -> str:
        """Of the file, in hexadecimal; the recorded one of a file that is gone.

        Raises:
            SdqError: the file is gone and was never read.
        """
        if self.path.is_file():
            return sha256_file(self.path)
        if self.recorded is None:
            raise SdqError(f"The adapter {self.path} does not exist.", "Give a .safetensors file, or FILE=WEIGHT.")
        return self.recorded


def parse_lora(text: str) -> Lora:
    """`FILE` or `FILE=WEIGHT`.

    Raises:
        SdqError: the weight is no number, or the file is missing or no safetensors.
    """
    name, _, number = text.rpartition("=") if "=" in text and not Path(text).is_file() else (text, "", "1")
    try:
        lora = Lora(Path(name).expanduser().absolute(), float(number))
    except ValueError as error:
        raise SdqError(f"The weight {number!r} of the adapter {name} is no number.", "Write FILE=0.8.") from error
    if lora.weight != lora.weight or abs(lora.weight) == float("inf"):
        raise SdqError(f"The weight {number!r} of the adapter {name} is no number.", "Write FILE=0.8.")
    if not lora.path.is_file():
        raise SdqError(f"The adapter {lora.path} does not exist.", "Give a .safetensors file, or FILE=WEIGHT.")
    if lora.path.suffix != ".safetensors":
        raise SdqError(
            f"The adapter {lora.path} is no .safetensors file; loading a pickle can run any code.",
            "Convert it where you trust it: safetensors.torch.save_file(torch.load(FILE), OTHER).",
        )
    return lora


def fuse_loras(source: Any, loras: Sequence[Lora], folder: Path) -> None:
    """Write a copy of a model whose weights have the adapters in them, by their own formulas (`sdq_deploy.adapters`).

    A part that no adapter changes is copied file by file. The others are held one at a time, in FP32, and stored as the
    model stores them.

    Args:
        source: the loaded model (`sdq_export.source.Source`).
        loras: in the order in which they are fused.
        folder: does not exist yet; becomes a diffusers folder.

    Raises:
        SdqError: an adapter does not fit the model, or has tensors that cannot be used.
    """
    from sdq_deploy.adapters.file import open_adapter
    from sdq_deploy.adapters.names import layer_names

    names = layer_names(source)
    adapters = [open_adapter(lora.path, names) for lora in loras]
    changed = {part for adapter in adapters for part in adapter.parts()}
    for name in source.files.names():
        if name.partition("/")[0] not in changed or ".safetensors" not in name:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, target)
    for part in sorted(changed):
        model, dtype = source.own(part), source.files.dtype(part)
        for lora, adapter in zip(loras, adapters, strict=True):
            _fuse(model, part, lora, adapter, dtype)
        model.to(dtype).save_pretrained(folder / part, safe_serialization=True, variant=source.files.variant(part))
        source.release(part)


def _fuse(model: Any, part: str, lora: Lora, adapter: Any, dtype: Any) -> None:
    """Put one adapter into one part's weights, in place; they will be stored in `dtype`."""
    import torch

    from sdq_deploy.adapters.formulas import new_weight

    with torch.no_grad():
        for change, tensors, scale in adapter.tensors(part):
            modules = [model.get_submodule(path) for path in change.layer.paths]
            rows = [len(module.weight) for module in modules]
            weight = torch.cat([module.weight.float() for module in modules])
            try:
                new = new_weight(_exchanged(weight, change), tensors, scale, lora.weight)
                new = _exchanged(new, change)
                if not bool(torch.isfinite(new.to(dtype)).all()):
                    raise ValueError("makes weights that are not finite")
                if "bias_diff" in tensors:
                    _add_to_bias(modules, rows, lora.weight * _exchanged(tensors["bias_diff"], change))
            except (ValueError, RuntimeError) as error:
                raise SdqError(
                    f"The adapter {lora.path} does not fit the model: {change.name} {error}.",
                    "It was made for another model, or its file is damaged.",
                ) from error
            for module, piece in zip(modules, new.split(rows), strict=True):
                module.weight.copy_(piece)


def _exchanged(weight: Any, change: Any) -> Any:
    import torch

    return torch.cat(weight.chunk(2)[::-1]) if change.layer.exchanged else weight


def _add_to_bias(modules: Sequence[Any], rows: Sequence[int], delta: Any) -> None:
    if any(module.bias is None for module in modules) or len(delta) != sum(rows):
        raise ValueError(f"is a change of {len(delta)} biases, which the layer does not have")
    for module, piece in zip(modules, delta.split(rows), strict=True):
        module.bias.copy_(module.bias.float() + piece)
