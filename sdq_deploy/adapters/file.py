"""An adapter's file: which layers it changes, by which tensors, scaled how; every tensor is used or named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdq_deploy.adapters.formulas import rank_of, unused_roles
from sdq_deploy.adapters.names import Layer, split_key
from sdq_engines.errors import SdqError

__all__ = ["AdapterFile", "Change", "open_adapter"]

#: Where diffusers writes an adapter's LoraConfig, and peft.
_METADATA, _PEFT_CONFIG, _PEFT_PREFIX = "lora_adapter_metadata", "adapter_config.json", "base_model.model."
_NAMED_KEYS = 4


@dataclass
class Change:
    """What an adapter does to one layer."""

    layer: Layer
    name: str
    """The layer's name in the file."""
    keys: dict[str, str] = field(default_factory=dict)
    """Role -> key."""


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter; tensors are read when they are asked for."""

    path: Path
    changes: tuple[Change, ...]
    configs: Mapping[str, Mapping[str, Any]]
    """Part of the model -> the LoraConfig that the file brings for it."""

    def parts(self) -> set[str]:
        """The parts of the model that it changes."""
        return {change.layer.part for change in self.changes}

    def tensors(self, part: str) -> Iterator[tuple[Change, dict[str, Tensor], float]]:
        """(change, role -> f32 without "alpha", alpha / rank) of each layer of a part."""
        with safe_open(self.path, "pt") as opened:
            for change in self.changes:
                if change.layer.part == part:
                    tensors = {role: opened.get_tensor(key).float() for role, key in change.keys.items()}
                    if "lora_magnitude_vector" in change.keys.get("magnitude", ""):
                        tensors["magnitude"] = tensors["magnitude"].flatten()
                    alpha = tensors.pop("alpha", None)
                    yield change, tensors, self._scale(change, tensors, None if alpha is None else float(alpha))

    def _scale(self, change: Change, tensors: Mapping[str, Tensor], alpha: float | None) -> float:
        config = self.configs.get(change.layer.part, {})
        rank = rank_of(tensors)
        if alpha is not None:
            return 1.0 if rank is None else alpha / rank
        if not config or "diff" in tensors:
            return 1.0
        rank = rank or config["r"]
        alpha = config.get("lora_alpha", config.get("alpha", rank))
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", change.layer.paths[0]):
                alpha = value
                break
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def open_adapter(path: Path, names: Mapping[str, Layer]) -> AdapterFile:
    """Read which layers a file changes.

    Args:
        path: a .safetensors file.
        names: every spelling of the model's layers (`adapters.names.layer_names`).

    Raises:
        SdqError: the file is damaged; tensors of it belong to no layer of the model, or are of an unknown kind; a layer
            has half of what its kind needs; peft's own naming without the file in which peft keeps alpha.
    """
    try:
        with safe_open(path, "pt") as opened:
            keys, metadata = list(opened.keys()), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SdqError(f"The adapter {path} cannot be read: {error}.", "Get it again.") from error
    changes = _changes(path, keys, names)
    return AdapterFile(path, tuple(changes), _configs(path, changes, keys, metadata))


def _changes(path: Path, keys: Sequence[str], names: Mapping[str, Layer]) -> list[Change]:
    changes: dict[Layer, Change] = {}
    unknown: list[str] = []
    for key in keys:
        split = split_key(key)
        layer = names.get(split[0]) if split is not None else None
        if split is None or layer is None:
            unknown.append(key)
            continue
        change = changes.setdefault(layer, Change(layer, split[0]))
        if split[1] in change.keys:
            raise SdqError(
                f"The adapter {path} does not fit the model: {key} and {change.keys[split[1]]} both change one layer.",
                "Get the file again: it names a layer twice.",
            )
        change.keys[split[1]] = key
    unknown_hint = (
        "It may be of another model family, or of a kind that cannot be fused; docs/models.md lists those that can."
    )
    _refuse(path, unknown, len(keys), "belong to no layer of it or are of no kind that can be fused", unknown_hint)
    halves = [change.keys[role] for change in changes.values() for role in unused_roles(change.keys)]
    _refuse(
        path, halves, len(keys), "lack the other tensors of their layer, or cannot be used beside them", "Get it again."
    )
    if not changes:
        raise SdqError(f"The adapter {path} holds no tensor.", "Get it again.")
    return list(changes.values())


def _refuse(path: Path, keys: Sequence[str], count: int, why: str, hint: str) -> None:
    if keys:
        some = ", ".join(sorted(keys)[:_NAMED_KEYS]) + (", ..." if len(keys) > _NAMED_KEYS else "")
        raise SdqError(
            f"The adapter {path} does not fit the model: {len(keys)} of its {count} tensors {why}: {some}.", hint
        )


def _configs(
    path: Path, changes: Sequence[Change], keys: Sequence[str], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    parts = {change.layer.part for change in changes}
    try:
        if any(key.startswith(_PEFT_PREFIX) for key in keys):
            config = json.loads((path.parent / _PEFT_CONFIG).read_text(encoding="utf-8"))
            return {part: dict(config) for part in parts}
        written = json.loads(metadata.get(_METADATA, "{}"))
        found = {
            part: {k[len(part) + 1 :]: v for k, v in written.items() if k.startswith(f"{part}.")} for part in parts
        }
        return {part: config for part, config in found.items() if "r" in config}
    except (OSError, ValueError, AttributeError) as error:
        raise SdqError(
            f"The adapter {path} does not say by how much it is scaled: {error}.",
            f"peft keeps that in {_PEFT_CONFIG}, which belongs beside the file.",
        ) from error
