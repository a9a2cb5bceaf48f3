"""The model that a command names, found and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from sdq_export.single_file import FromFile
    from sdq_export.source import Source

__all__ = ["EMBEDDED", "no_single_file", "open_model", "resolve_model"]

#: The model that ships with the project.
EMBEDDED = "shapes-64"


def resolve_model(model: str) -> str | Path:
    """The folder of the embedded model for its name; any other path or hub id as it is."""
    if model != EMBEDDED:
        return model
    from sdq_deploy.shapes64 import model_path

    return model_path()


def open_model(model: str, revision: str | None = None, from_file: FromFile | None = None) -> Source:
    """The checkpoint that a command's MODEL names; a single file is converted into the cache, once.

    Raises:
        SdqError: it does not exist or cannot be used.
    """
    from sdq_export.single_file import FromFile, is_single_file
    from sdq_export.source import load_source

    if is_single_file(model):
        from sdq_export.conversion import converted_folder

        return load_source(converted_folder(Path(model), from_file or FromFile()), named=model)
    if from_file is not None and from_file.given:
        raise no_single_file(model)
    return load_source(resolve_model(model), revision)


def no_single_file(model: str) -> SdqError:
    """What is said to a user who gives the options of a single file with another model."""
    return SdqError(
        f"{model} is no single file, and --config and --vae-from say how to convert one.", "Leave them out."
    )
