"""A whole model in one .safetensors file, as WebUIs have it: what it holds and of which family it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from sdq_engines.errors import SdqError

__all__ = ["FromFile", "Header", "is_single_file", "read_header"]

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_COUNTERS = {"I64", "I32", "BOOL"}
"""Of position ids and training steps, which no model of ours reads."""
_ADAPTER = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w", ".lokr_w", ".lora.down.", ".lora.up.")
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "transformer": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
_NAMED_KEYS = 3


class FromFile(BaseModel):
    """How a single file is converted, beside what is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | None = None
    """A diffusers folder or hub id that has its configuration, or a folder with its tokenizers alone."""
    vae_from: Path | None = None
    """Another file, whose VAE is taken."""

    @classmethod
    def of(cls, config: str | None, vae_from: Path | None) -> FromFile:
        """From the options of a command, their paths absolute: they are recorded.

        Raises:
            SdqError: the VAE's file does not exist.
        """
        if vae_from is not None and not vae_from.expanduser().is_file():
            raise SdqError(f"The VAE {vae_from} does not exist.", "Give --vae-from a .safetensors file.")
        if config is not None and Path(config).expanduser().exists():
            config = str(Path(config).expanduser().resolve())
        return cls(config=config, vae_from=None if vae_from is None else vae_from.expanduser().resolve())

    @property
    def given(self) -> bool:
        """Whether the user said anything."""
        return self != FromFile()


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors.

    Attributes:
        path: the file.
        shapes: of each tensor.
        dtypes: of each tensor, as safetensors names them.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def hollow(self, keys: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The tensors, all or some, with their shapes and without memory."""
        return {key: torch.empty(self.shapes[key], device="meta") for key in (self.shapes if keys is None else keys)}

    def keys_of(self, part: str) -> list[str]:
        """The keys of a part such as "unet" or "text_encoder_2"; none where the file does not hold it."""
        found = [key for key in self.shapes if key.startswith(_PREFIXES[part])]
        if not found and part == "transformer":
            return [key for key in self.shapes if not key.startswith(_every_other_prefix(part))]
        return found

    def dtype_of(self, keys: Sequence[str]) -> torch.dtype:
        """What most of these tensors are stored in."""
        counts = Counter(self.dtypes[key] for key in keys if self.dtypes[key] in _DTYPES)
        return _DTYPES[counts.most_common(1)[0][0]] if counts else torch.float32

    @contextlib.contextmanager
    def tensors(self, keys: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """These tensors, read."""
        with safe_open(self.path, "pt") as opened:
            yield {key: opened.get_tensor(key) for key in keys}


def is_single_file(model: str | Path) -> bool:
    """Whether this names a file that is there, rather than a folder, a hub id or the embedded model."""
    return Path(model).expanduser().is_file()


def read_header(path: Path) -> Header:
    """What is in a file; no tensor is read.

    Raises:
        SdqError: it is a pickle or no safetensors file, is damaged, an adapter, or stores weights in a type that was
            made from another, such as FP8.
    """
    if path.suffix in _PICKLES:
        raise SdqError(
            f"The model {path} is a pickle, and loading a pickle can run any code; safetensors are wanted.",
            "Get the .safetensors file of the same model, or convert it where you trust it.",
        )
    try:
        with safe_open(path, "pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
            shapes = {key: tuple(each.get_shape()) for key, each in slices.items()}
            dtypes = {key: str(each.get_dtype()) for key, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise SdqError(
            f"The model {path} cannot be read as a .safetensors file: {error}.",
            "Give a diffusers folder, a hub id, or a model.safetensors; if it is one, get it again.",
        ) from error
    if any(mark in key for key in shapes for mark in _ADAPTER):
        raise SdqError(f"The file {path} is an adapter, not a model.", f"Fuse it into its model: --lora {path}")
    _refuse_types(path, dtypes)
    return Header(path, shapes, dtypes)


def _refuse_types(path: Path, dtypes: Mapping[str, str]) -> None:
    for dtype in sorted({*dtypes.values()} - {*_DTYPES, *_COUNTERS}):
        keys = [key for key, each in dtypes.items() if each == dtype]
        some = ", ".join(keys[:_NAMED_KEYS]) + (", ..." if len(keys) > _NAMED_KEYS else "")
        raise SdqError(
            f"The file {path} stores {len(keys)} of its {len(dtypes)} tensors as {dtype}, which have lost what "
            f"quantization needs to start from: {some}.",
            "Give the FP16, BF16 or FP32 file of the same model.",
        )


def _every_other_prefix(part: str) -> tuple[str, ...]:
    others = [prefix for name, prefixes in _PREFIXES.items() if name not in (part, "unet") for prefix in prefixes]
    return (*others, "text_encoders.", "model_ema.")
