"""An export by name: what `sdq-deploy export` and the demo call, for a training run's folder or any MODEL."""

from __future__ import annotations

from pathlib import Path

from sdq_deploy.libraries import quiet_libraries
from sdq_deploy.models import open_model, open_run_model
from sdq_deploy.training.folder import RunFolder
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import load_checkpoint
from sdq_export.jobs import ExportListener, ExportSettings, check_run, export_model, export_run
from sdq_export.single_file import FromFile
from sdq_export.writer import ExportResult

__all__ = ["export_named"]


def export_named(
    named: str,
    out: Path,
    settings: ExportSettings,
    *,
    model: str | None = None,
    revision: str | None = None,
    from_file: FromFile | None = None,
    listener: ExportListener | None = None,
) -> ExportResult:
    """Export what a user names, and build engines.

    Args:
        named: a finished training run, or a quantized checkpoint alone; else a model, which is exported unquantized.
        out: the package's folder.
        settings: what is wanted.
        model: where the model that a run was trained from is now, if it was moved.
        revision: of a model on the hub.
        from_file: how a model that is a single file is converted.
        listener: hears how it goes.

    Raises:
        SdqError: there is no such run or model, or as `export_run` and `export_model`.
    """
    quiet_libraries()
    if not _is_run(named):
        if model is not None:
            raise SdqError(f"--model names the model of a RUN, and {named} is none.", "Leave --model out.")
        return export_model(open_model(named, revision, from_file), out, settings, listener)
    RunFolder(Path(named)).require_finished()
    checkpoint = load_checkpoint(named)
    check_run(checkpoint, settings)  # before the model is read and hashed
    source = open_run_model(named, checkpoint.info.source, model, from_file)
    return export_run(source, checkpoint, out, settings, listener)


def _is_run(named: str) -> bool:
    """A training run, finished or not, or a quantized checkpoint alone."""
    return any((Path(named) / name).is_file() for name in ("run.json", "quant.json"))
