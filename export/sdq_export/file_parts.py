"""One part of a single file as the model of diffusers or transformers, with nothing left over and nothing made up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.single_file import Header
from sdq_export.source import Source

__all__ = ["load_part"]

_NAMED_KEYS = 3
_LAYERS = re.compile(r"\.(?:layers|resblocks|block)\.(\d+)\.")
_UNREAD = ("num_batches_tracked",)


@torch.no_grad()
def load_part(source: Source, part: str, header: Header, keys: Sequence[str]) -> nn.Module:
    """Load a part from a file.

    Args:
        source: a diffusers folder with its configuration.
        part: such as "unet" or "text_encoder_2".
        header: of the file.
        keys: the part's, in the file.

    Raises:
        SdqError: the file lacks tensors of the part, has others, or has them in other shapes.
    """
    kind, folder = source.kind(part), str(source.folder)
    dtype = header.dtype_of(keys)
    hollow = header.hollow(keys)
    with header.tensors(keys) as tensors:
        try:
            if hasattr(kind, "config_class"):
                model = _transformers_model(kind, tensors, folder, part, dtype)
                _check_encoder(model, hollow, part, header)
            else:
                _check_mapping(kind, source, part, hollow, header)
                model = kind.from_single_file(
                    tensors, config=folder, subfolder=part, local_files_only=True, torch_dtype=dtype
                )
        except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise _unfit(header, part, reason) from error
    return model.eval().requires_grad_(False)


def _transformers_model(kind: Any, tensors: dict[str, Tensor], folder: str, part: str, dtype: torch.dtype) -> Any:
    from diffusers.loaders import single_file_utils as diffusers_files

    made = (
        diffusers_files.create_diffusers_t5_model_from_checkpoint
        if kind.__name__.startswith("T5")
        else diffusers_files.create_diffusers_clip_model_from_ldm
    )
    model = made(kind, checkpoint=tensors, config=folder, subfolder=part, local_files_only=True, torch_dtype=dtype)
    model.tie_weights()  # making it without memory has untied T5's two names of one embedding
    return model


def _check_encoder(model: nn.Module, hollow: Mapping[str, Tensor], part: str, header: Header) -> None:
    """Every parameter was filled, and every layer has its place but OpenCLIP's last, before which SD 2 stops."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise _unfit(header, part, f"it lacks {_some(missing)}")
    config: Any = model.config
    layers = getattr(config, "num_hidden_layers", None) or config.num_layers
    numbers = [int(found.group(1)) for key in hollow if (found := _LAYERS.search(key))]
    allowed = layers + int(part == "text_encoder" and any(".resblocks." in key for key in hollow))
    if max(numbers, default=-1) >= allowed:
        raise _unfit(header, part, f"it has {max(numbers) + 1} layers, its configuration {layers}")


def _check_mapping(kind: Any, source: Source, part: str, hollow: dict[str, Tensor], header: Header) -> None:
    """diffusers' mapping of names, tried on tensors without memory: it gives all of the model's, and no others."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    config = kind.load_config(source.folder / part, local_files_only=True)
    with torch.device("meta"):
        wanted = kind.from_config(config).state_dict()
    if set(hollow) == set(wanted):
        found, left = dict(hollow), []
    else:
        given = dict(hollow)
        found = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"](checkpoint=given, config=config)
        taken = {id(tensor) for tensor in found.values()}
        # the mapping of an MMDiT takes tensors out as it uses them; a VAE's makes new ones of its attention
        left = [key for key in given if part == "transformer" or (id(given[key]) not in taken and ".attn_" not in key)]
    if missing := [name for name in wanted if name not in found]:
        raise _unfit(header, part, f"it lacks {_some(missing)}")
    if left := [*(key for key in left if not key.endswith(_UNREAD)), *(name for name in found if name not in wanted)]:
        raise _unfit(header, part, f"its configuration has no place for {_some(left)}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{list(tensor.shape)}, its configuration wants {list(wanted[name].shape)}"
            raise _unfit(header, part, f"{name} is {shapes}")


def _unfit(header: Header, part: str, reason: str) -> SdqError:
    return SdqError(
        f"The {part} of {header.path} does not fit its configuration: {reason}.",
        "Give a diffusers folder of the same architecture: --config FOLDER",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED_KEYS]) + (f", ... ({len(names)} in all)" if len(names) > _NAMED_KEYS else "")
