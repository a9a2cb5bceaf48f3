"""Reading the files of a checkpoint with diffusers and transformers: what they would fill in, leave out or trip over is
one sentence here that names the file and the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sdq_engines.errors import SdqError
from sdq_export.configs import read_json

__all__ = ["load_model", "load_tokenizer", "naming"]

_AGAIN = "Download or save the checkpoint again: a file of it is damaged, or belongs to another model."
_OTHER_SHAPE = re.compile(r"because (\S+) expected shape (.+?), but got (.+?)\. ")


@contextmanager
def naming(what: str, hint: str = _AGAIN) -> Iterator[None]:
    """Turn whatever another library raises in the block into one sentence about `what`.

    Raises:
        SdqError: in place of any other exception, with the beginning of its text.
    """
    try:
        yield
    except (SdqError, MemoryError):
        raise
    except Exception as error:  # two libraries, and what they call in turn, raise two dozen types
        first, *more = str(error).strip().splitlines() or ["no reason is given"]
        reason = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
        if not isinstance(error, OSError | ValueError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        if "not enough memory" in reason or "out of memory" in reason:
            hint = "Free memory, or take a machine with more."
        elif isinstance(error, ImportError):
            hint = "Install the library that it names."
        raise SdqError(f"{what} cannot be loaded: {reason}", hint) from error


def load_model(kind: Any, folder: Path, name: str, model: str, files: list[Path], variant: str | None) -> nn.Module:
    """A diffusers or transformers model with exactly the weights that its class asks for.

    Args:
        kind: the class.
        folder: the checkpoint's.
        name: the part's folder in it.
        model: what the user named.
        files: the part's weight files.
        variant: in the files' names, "fp16" for one.

    Returns:
        The model in FP32, eval, without gradients, on the CPU.

    Raises:
        SdqError: a file cannot be read; a tensor is missing, of another shape, not the class's, or not finite. What the
            class itself declares as ignorable (old checkpoints' position_ids) may be there or not.
    """
    what = f"The {name} of {model}"
    for file in files:
        with naming(f"The file {name}/{file.name} of {model}"), safe_open(file, framework="np"):
            pass  # a header that promises more bytes than there are is refused
    # transformers lists what is of another shape only when told to go on; diffusers goes on at the cost of memory
    lists_shapes = {"ignore_mismatched_sizes": True} if hasattr(kind, "config_class") else {}
    with naming(what):
        try:
            loaded, found = kind.from_pretrained(
                folder / name,
                torch_dtype=torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **lists_shapes,
            )
        except ValueError as error:
            if (shapes := _OTHER_SHAPE.search(str(error))) is None:
                raise
            raise _other_shape(name, model, *shapes.groups()) from error
    for key, stored, wanted in found["mismatched_keys"]:
        raise _other_shape(name, model, key, wanted, stored)
    _refuse_keys(what, "lacks tensors that it needs", found["missing_keys"])
    _refuse_keys(what, f"has tensors that {kind.__name__} does not take", found["unexpected_keys"])
    for said in found["error_msgs"]:
        raise SdqError(f"{what} cannot be loaded: {said}", _AGAIN)
    _refuse_infinite(loaded, folder, model, files)
    made: nn.Module = loaded.eval().requires_grad_(False)
    return made


def load_tokenizer(kind: Any, folder: Path, name: str, model: str) -> Any:
    """A tokenizer of transformers.

    Raises:
        SdqError: one of its files is missing or damaged, or it knows no end mark or padding.
    """
    _require_vocabulary(kind, folder / name, name, model)
    for file in sorted((folder / name).glob("*.json")):
        read_json(folder, f"{name}/{file.name}", model)
    with naming(f"The {name} of {model}"):
        tokenizer = kind.from_pretrained(folder / name, local_files_only=True)
        for token in ("eos_token", "pad_token"):
            if getattr(tokenizer, f"{token}_id") is None:
                raise SdqError(
                    f"The {name} of {model} names no {token} that is in its vocabulary.",
                    f"Name one in {name}/tokenizer_config.json.",
                )
    return tokenizer


def _require_vocabulary(kind: Any, folder: Path, name: str, model: str) -> None:
    """transformers makes a tokenizer of no words where the files are missing."""
    hint = f"Copy {name}/ from the checkpoint that this one was made from, or download this one again."
    if not folder.is_dir():
        raise SdqError(f"{model} has no folder {name}/, without which no prompt can be read.", hint)
    files: dict[str, str] = dict(kind.vocab_files_names)
    whole = files.pop("tokenizer_file", None)
    missing = [file for file in files.values() if not (folder / file).is_file()]
    if missing and not (whole and (folder / whole).is_file()):
        either = f"{whole}, or {' and '.join(files.values())}" if whole and files else whole or ", ".join(missing)
        raise SdqError(f"The folder {name}/ of {model} lacks the tokenizer's words: {either}.", hint)


def _other_shape(name: str, model: str, key: str, wanted: Any, stored: Any) -> SdqError:
    shapes = [str(shape).removeprefix("torch.Size(").removesuffix(")") for shape in (stored, wanted)]
    return SdqError(
        f"The tensor {key} of the {name} of {model} has shape {shapes[0]}; by {name}/config.json it has {shapes[1]}.",
        "The weights and the configuration belong to different models: take both from one.",
    )


def _refuse_keys(what: str, does: str, keys: Iterable[str]) -> None:
    if named := sorted(keys):
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        raise SdqError(f"{what} {does}: {', '.join(named[:3])}{more}.", _AGAIN)


def _refuse_infinite(loaded: nn.Module, folder: Path, model: str, files: list[Path]) -> None:
    for key, tensor in loaded.state_dict().items():
        # the least and the largest are NaN where any value is
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            file = _file_of(key, files).relative_to(folder).as_posix()
            raise SdqError(
                f"The tensor {key} in {file} of {model} holds a NaN or an infinity.",
                "Download the file again, or take a conversion that did not overflow.",
            )


def _file_of(key: str, files: list[Path]) -> Path:
    """The file that stores a tensor, perhaps under an older name that ends in the key."""
    for file in files:
        with safe_open(file, framework="np") as stored:
            if any(name.endswith(key) for name in stored.keys()):  # noqa: SIM118 (not a mapping)
                return file
    return files[0]
