"""The model that a command names, or that a run was trained from, found and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from sdq_export.checkpoint import SourceRef
    from sdq_export.single_file import FromFile
    from sdq_export.source import Source

__all__ = ["EMBEDDED", "no_single_file", "open_model", "open_run_model", "resolve_model"]

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


def open_run_model(
    run: str | Path, trained_from: SourceRef, named: str | None = None, from_file: FromFile | None = None
) -> Source:
    """The model that a run was trained from: the one that the user names, the run's own, or the one where it was.

    Args:
        run: the run, or its checkpoint's folder.
        trained_from: what the checkpoint records.
        named: where the model is now; None leaves it to the record.
        from_file: how `named` is converted if it is a single file.

    Raises:
        SdqError: it is not there, or its hash is not the recorded one.
    """
    from sdq_deploy.training.folder import RunFolder
    from sdq_export.source import load_source
    from sdq_export.source_files import require_same_model

    folder = Path(run)
    around = RunFolder(folder if (folder / "run.json").is_file() else folder.parent)
    if named is None and from_file is not None and from_file.given:
        raise SdqError("--config and --vae-from say how --model FILE is converted.", "Leave them out, or add --model.")
    if named is not None:
        source = open_model(named, from_file=from_file)
    elif around.prepared.is_file():
        source = load_source(around.model)
    else:
        try:
            source = load_source(resolve_model(trained_from.model), trained_from.revision)
        except SdqError as error:
            raise SdqError(
                f"The model that the run {run} was trained from cannot be loaded from where it was. {error.message}",
                "Say where it is now: --model FOLDER",
            ) from error
    what = f"The run {run} was not trained from {source.model} as it is"
    hint = "Name the model that it was trained from, --model FOLDER, or train it again."
    require_same_model(source, trained_from.sha256, trained_from.parts, what, hint)
    return source
