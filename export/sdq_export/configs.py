"""The JSON files of a checkpoint: read, and checked against the signatures of the classes that take them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sdq_engines.errors import SdqError

__all__ = ["check_config", "check_types", "read_json"]


def read_json(folder: Path, name: str, model: str) -> dict[str, Any]:
    """The settings in a JSON file of a checkpoint.

    Args:
        folder: the checkpoint's.
        name: of the file, relative to it.
        model: what the user named.

    Raises:
        SdqError: the file is missing, is not JSON, or holds something else than an object.
    """
    file = folder / name
    if not file.is_file():
        raise SdqError(f"{model} has no {name}.", "Download or save the checkpoint again, whole.")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of UTF-8
        raise SdqError(
            f"The file {name} of {model} is not valid JSON: {error}.", "Download or save the checkpoint again."
        ) from error
    if not isinstance(tree, dict):
        raise SdqError(f"The file {name} of {model} holds a {type(tree).__name__}, not an object of settings.")
    return tree


def check_config(kind: Any, folder: Path, name: str, model: str) -> None:
    """Refuse a configuration that is missing, damaged, of another model or of other types than its class declares.

    Args:
        kind: the class of diffusers or transformers that it is for.
        folder: the checkpoint's.
        name: of the file, relative to it.
        model: what the user named.

    Raises:
        SdqError: naming the file, and the key where it is one; also for weights that are quantized already.
    """
    config = read_json(folder, name, model)
    if config.get("quantization_config") is not None:
        raise SdqError(
            f"The file {name} of {model} has a quantization_config: its weights are quantized already.",
            "Give the checkpoint in FP32, FP16 or BF16 that it was made from.",
        )
    if not hasattr(kind, "config_class"):
        check_types(kind, config, name, model)
        return
    # transformers checks types itself, but takes another model's configuration
    found, wanted = config.get("model_type"), kind.config_class.model_type
    if found is not None and not wanted.startswith(str(found)):
        raise SdqError(
            f"The file {name} of {model} has model_type = {found!r}; {kind.__name__} wants {wanted!r}.",
            "Take the folder from the model that model_index.json describes.",
        )


def check_types(kind: Any, config: dict[str, Any], name: str, model: str) -> None:
    """Refuse settings of another type than the class declares for them: diffusers takes them and computes on.

    Args:
        kind: a class of diffusers whose constructor takes the settings.
        config: the settings; keys that the class does not know are left to diffusers, which ignores them.
        name: of the file, relative to the checkpoint.
        model: what the user named.

    Raises:
        SdqError: naming the file, the key and its value.
    """
    parameters = inspect.signature(kind.__init__).parameters
    for key, value in config.items():
        if key in parameters and not _admits(parameters[key], value):
            raise SdqError(
                f"The file {name} of {model} has {key} = {json.dumps(value)}; {kind.__name__} wants "
                f"{_in_words(parameters[key].annotation)}.",
                "Correct the value in the file.",
            )


def _admits(parameter: inspect.Parameter, value: Any) -> bool:
    if value is None:
        return parameter.annotation not in (int, float) or parameter.default is None
    return _is_of(parameter.annotation, value)


def _in_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _is_of(annotation: Any, value: Any) -> bool:
    """Whether a JSON value is of an annotated type; what cannot be told from JSON is admitted."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if value is None or annotation is inspect.Parameter.empty:
        return True
    if origin in (Union, UnionType):
        return any(_is_of(each, value) for each in inner)
    if annotation is str or origin is Literal:
        return isinstance(value, str)
    if annotation is bool:
        return value in (False, True)
    if annotation is int:
        return isinstance(value, int)
    if annotation is float:
        return isinstance(value, int | float)
    if (origin or annotation) in (tuple, list):
        kinds = [each for each in inner if each is not Ellipsis]
        return isinstance(value, list) and all(any(_is_of(kind, each) for kind in kinds or [Any]) for each in value)
    return annotation is not type(None)
