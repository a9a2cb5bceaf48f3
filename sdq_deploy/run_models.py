"""The model that a run was trained from, found and loaded."""

from __future__ import annotations

from pathlib import Path

from sdq_deploy.models import open_model, resolve_model
from sdq_deploy.training.folder import RunFolder
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import SourceRef
from sdq_export.identity import require_same_model
from sdq_export.single_file import FromFile
from sdq_export.source import Source, load_source

__all__ = ["open_run_model"]


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
