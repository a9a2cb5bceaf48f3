"""The quantized checkpoint: what training leaves behind and export reads. A folder of these files.

denoiser.safetensors   the weights' codes, of their formats' types (int8, also for INT4), FP32 scales, and every
                       parameter that is not quantized
embeddings.safetensors the textual inversions that prompts of the training could name, where there were any
quant.json             the QuantSpec, the sampler it was trained for, and the source checkpoint it belongs to
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write, atomic_write_text
from sdq_engines.validation import first_mistake
from sdq_export.embeddings import Embedding, packed, unpacked
from sdq_export.quantspec import QuantSpec, WeightSite
from sdq_export.rounding import round_, stored_dtype
from sdq_export.sampler import SamplerPlan, compile_sampler, saved_scheduler
from sdq_export.text_settings import TextSettings

__all__ = [
    "CHECKPOINT_FOLDER",
    "CheckpointInfo",
    "QuantizedCheckpoint",
    "SamplerSettings",
    "SourceRef",
    "dequantize_weight",
    "load_checkpoint",
    "load_embeddings",
    "quantize_weight",
    "save_checkpoint",
    "scale_key",
    "weight_key",
    "weight_scale_key",
]

#: Where a run keeps its quantized checkpoint.
CHECKPOINT_FOLDER = "checkpoint"
_TENSORS, _EMBEDDINGS, _SPEC = "denoiser.safetensors", "embeddings.safetensors", "quant.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRef(_Strict):
    """The checkpoint that was quantized: where it was, a local path or hub id, and the hashes by which it is known."""

    model: str
    revision: str | None = None
    sha256: str
    """Over all parts."""
    parts: dict[str, str] = Field(default_factory=dict)
    """Part -> its hash (`Source.hashes`)."""


class SamplerSettings(_Strict):
    """The sampler that the steps of the QuantSpec belong to: the class, config and steps of a diffusers scheduler."""

    scheduler: str
    config: dict[str, Any]
    num_inference_steps: int
    guidance_scale: float

    def compile(self) -> SamplerPlan:
        """The sampler, compiled."""
        return compile_sampler(saved_scheduler(self.scheduler, self.config), self.num_inference_steps)


class CheckpointInfo(_Strict):
    """Everything in quant.json."""

    kind: str = "sdq-checkpoint"
    spec: QuantSpec
    sampler: SamplerSettings
    source: SourceRef
    text: TextSettings = TextSettings()
    """How prompts were read in training."""
    notes: dict[str, Any] = Field(default_factory=dict)
    """What training measured: recipe, trajectory error at the start and at the best state, times."""


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A loaded checkpoint; `tensors` are keyed as `weight_key`, `weight_scale_key`, `scale_key` and UNet names say."""

    info: CheckpointInfo
    tensors: dict[str, Tensor]
    embeddings: tuple[Embedding, ...] = ()
    """The textual inversions that prompts of the training could name."""

    @property
    def spec(self) -> QuantSpec:
        """The sites."""
        return self.info.spec


def weight_key(layer: str) -> str:
    """Key of a layer's weight codes, of its format's stored type, in the torch weight's shape."""
    return f"{layer}.weight"


def weight_scale_key(layer: str) -> str:
    """Key of a layer's weight scales, FP32 [C_out] or [C_out, blocks]."""
    return f"{layer}.weight_scale"


def scale_key(site_name: str) -> str:
    """Key of an activation site's scales, FP32 [G]."""
    return f"{site_name}.scale"


def quantize_weight(weight: Tensor, scale: Tensor, site: WeightSite) -> Tensor:
    """Codes of `weight` in the site's format, of its stored type, in the weight's shape (docs/quantization.md, "The
    grid")."""
    return round_(weight.float() / _spread(scale, weight, site), site.format).to(stored_dtype(site.format))


def dequantize_weight(codes: Tensor, scale: Tensor, site: WeightSite) -> Tensor:
    """FP32 weight that the codes stand for, in their shape."""
    return codes.float() * _spread(scale, codes, site)


def _spread(scale: Tensor, weight: Tensor, site: WeightSite) -> Tensor:
    """The scales [C_out] or [C_out, blocks] in a shape that broadcasts over the weight."""
    if site.format.block_size is not None:
        return scale.float().repeat_interleave(site.format.block_size, dim=1)
    return scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def save_checkpoint(
    folder: str | Path, info: CheckpointInfo, tensors: Mapping[str, Tensor], embeddings: Sequence[Embedding] = ()
) -> None:
    """Write a checkpoint; quant.json comes last, so that a folder that has it is whole.

    Raises:
        ValueError: a site's tensors are missing or not of the wanted dtype.
    """
    _check_tensors(info.spec, tensors)
    path = Path(folder)
    (path / _SPEC).unlink(missing_ok=True)
    with atomic_write(path / _TENSORS) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    (path / _EMBEDDINGS).unlink(missing_ok=True)
    if embeddings:
        kept, notes = packed(embeddings)
        with atomic_write(path / _EMBEDDINGS) as temporary:
            save_file(kept, temporary, metadata=notes)
    atomic_write_text(path / _SPEC, info.model_dump_json(indent=1))


def load_checkpoint(folder: str | Path) -> QuantizedCheckpoint:
    """Read a quantized checkpoint, from its own folder or from the run folder around it.

    Raises:
        SdqError: there is none, or it is damaged.
    """
    path = _inner(folder)
    if not (path / _SPEC).is_file():
        raise SdqError(
            f"{folder} holds no finished quantized checkpoint.", "Finish it with: sdq-deploy train … --resume"
        )
    try:
        info = CheckpointInfo.model_validate_json((path / _SPEC).read_text(encoding="utf-8"))
        tensors = load_file(path / _TENSORS)
        _check_tensors(info.spec, tensors)
    except (OSError, ValidationError, SafetensorError, ValueError) as error:
        reason = f"{_SPEC}: {first_mistake(error)}" if isinstance(error, ValidationError) else error
        raise SdqError(f"The quantized checkpoint in {path} is damaged: {reason}.", "Train it again.") from error
    return QuantizedCheckpoint(info=info, tensors=tensors, embeddings=tuple(load_embeddings(path)))


def load_embeddings(folder: str | Path) -> list[Embedding]:
    """The textual inversions of a quantized checkpoint, or of the one in a run folder.

    Raises:
        SdqError: their file is damaged.
    """
    path = _inner(folder) / _EMBEDDINGS
    return unpacked(path) if path.is_file() else []


def _inner(folder: str | Path) -> Path:
    path = Path(folder)
    return path / CHECKPOINT_FOLDER if (path / CHECKPOINT_FOLDER / _SPEC).is_file() else path


def _check_tensors(spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
    wanted = {weight_key(site.layer): stored_dtype(site.format) for site in spec.weights}
    wanted |= {weight_scale_key(site.layer): torch.float32 for site in spec.weights}
    wanted |= {scale_key(site.name): torch.float32 for site in spec.activations}
    for name, dtype in wanted.items():
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
        if tensors[name].dtype != dtype:
            raise ValueError(f"the tensor {name} is {tensors[name].dtype}, {dtype} is wanted")
    for site in spec.activations:
        if tensors[scale_key(site.name)].shape != (site.num_groups,):
            raise ValueError(f"{scale_key(site.name)} must have shape ({site.num_groups},)")
