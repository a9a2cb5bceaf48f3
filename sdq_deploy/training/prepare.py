"""Stage prepare: RUN/model, where what the run trains is not a checkpoint as it is: adapters fused, a file converted.

It comes before the other stages, for they depend on the model. One process makes it, under a temporary name that is
renamed when it is whole; it is kept while the model, the adapters and their weights are the same. Textual inversions
are copied too, to RUN/embeddings.safetensors, so that a run needs no file but its model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from sdq_deploy.lora import fuse_loras
from sdq_deploy.models import open_model, resolve_model
from sdq_deploy.sharing import await_files
from sdq_deploy.training.context import TrainingSettings
from sdq_deploy.training.folder import RunFolder
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write, atomic_write_json, atomic_write_text
from sdq_export.checkpoint import CHECKPOINT_FOLDER
from sdq_export.conversion import convert_file, file_identity
from sdq_export.embeddings import Embedding, packed, unpacked
from sdq_export.single_file import is_single_file
from sdq_export.source import Source, load_source

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["base_identity", "is_prepared", "keep_embeddings", "kept_embeddings", "prepare_model"]

_STAGE = "prepare"


def is_prepared(settings: TrainingSettings) -> bool:
    """Whether the run trains a model of its own, in RUN/model."""
    return bool(settings.loras) or is_single_file(settings.model)


def base_identity(settings: TrainingSettings) -> str:
    """Hash of the model that the user named, without adapters."""
    if is_single_file(settings.model):
        return file_identity(Path(settings.model), settings.from_file)
    return open_model(settings.model, settings.revision).sha256


def keep_embeddings(settings: TrainingSettings, recorded: dict[str, Any]) -> None:
    """Copy the vectors of the textual inversions into the run; `kept_embeddings` finds them.

    Args:
        settings: the training.
        recorded: the settings as run.json keeps them; written first, so that the folder is a run's.
    """
    folder = RunFolder(settings.out)
    if not settings.embeddings or settings.embeddings == _unpacked(folder):
        return
    status = folder.read_status()
    status["settings"] = recorded | {"identity": status["settings"].get("identity")}
    folder.write_status(status | {"method": settings.recipe.method, "status": _STAGE})
    tensors, notes = packed(settings.embeddings)
    with atomic_write(folder.embeddings) as temporary:
        save_file(tensors, temporary, metadata=notes)


def kept_embeddings(out: Path, recorded: Mapping[str, Any]) -> tuple[Embedding, ...]:
    """The textual inversions of a run that is resumed.

    Args:
        out: the run's folder.
        recorded: its settings, as run.json keeps them.

    Raises:
        SdqError: they are not in the run, or damaged.
    """
    wanted = [(each["name"], each["sha256"]) for each in recorded.get("embeddings", ())]
    found = _unpacked(RunFolder(out)) if wanted else ()
    if [(each.name, each.sha256) for each in found] != wanted:
        raise SdqError(
            f"The run {out} was stopped before it had copied its embeddings ({', '.join(name for name, _ in wanted)}).",
            "Give them again: --embedding NAME=FILE",
        )
    return found


def _unpacked(folder: RunFolder) -> tuple[Embedding, ...]:
    return tuple(unpacked(folder.embeddings)) if folder.embeddings.is_file() else ()


def prepare_model(
    settings: TrainingSettings, accelerator: Any, progress: Progress, recorded: dict[str, Any]
) -> tuple[Source, list[str]]:
    """The model that the run trains, and the name of this stage if it had to run.

    Args:
        settings: the training.
        accelerator: the main process makes the model, the others wait for it.
        progress: a started display.
        recorded: the settings as run.json keeps them.

    Raises:
        SdqError: the model or an adapter cannot be used, or RUN/model is not ours.
    """
    folder, ran = RunFolder(settings.out), False
    if accelerator.is_main_process:
        task = progress.add_task(_STAGE, total=None)
        keep_embeddings(settings, recorded)
        ran = _prepare(settings, folder, recorded)
        if ran and is_single_file(settings.model):
            progress.console.print((folder.model / "NOTICE").read_text(encoding="utf-8").strip(), markup=False)
        progress.update(task, total=1, completed=1)
    accelerator.wait_for_everyone()
    await_files([folder.prepared])
    return load_source(folder.model), [_STAGE] if ran else []


def _prepare(settings: TrainingSettings, folder: RunFolder, recorded: dict[str, Any]) -> bool:
    identity = base_identity(settings)
    inputs = _digest(identity, [(lora.sha256, lora.weight) for lora in settings.loras])
    if _recorded(folder).get("inputs") == inputs:
        return False
    if folder.model.exists() and not _recorded(folder):
        raise SdqError(
            f"The folder {folder.model} was not made by sdq-deploy; nothing was written.", "Give another --out."
        )
    status = folder.read_status()
    status |= {"settings": recorded | {"identity": identity}, "method": settings.recipe.method, "status": _STAGE}
    status["stages"][_STAGE] = {"inputs": inputs, "done": False, "seconds": 0.0}
    folder.write_status(status)
    shutil.rmtree(folder.path / CHECKPOINT_FOLDER, ignore_errors=True)  # an earlier model's is not this run's result
    started = time.perf_counter()
    _make_model(settings, folder, inputs)
    status["stages"][_STAGE] |= {"done": True, "seconds": round(time.perf_counter() - started, 2)}
    folder.write_status(status)
    return True


def _make_model(settings: TrainingSettings, folder: RunFolder, inputs: str) -> None:
    """RUN/model, whole or not at all."""
    for left in folder.path.glob(".model.*.tmp"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.path / f".model.{uuid.uuid4().hex[:8]}.tmp"
    try:
        made = _converted(settings, temporary / "file")
        if settings.loras:
            source = made or load_source(resolve_model(settings.model), settings.revision)
            fuse_loras(source, settings.loras, temporary / "fused")
            _write_notice(settings, source, temporary / "fused")
        last = temporary / ("fused" if settings.loras else "file")
        atomic_write_json(last / folder.prepared.name, {"kind": "sdq-model", "inputs": inputs, "model": settings.model})
        shutil.rmtree(folder.model, ignore_errors=True)
        os.replace(last, folder.model)
    except OSError as error:
        raise SdqError(f"The model could not be written to {folder.model}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _converted(settings: TrainingSettings, folder: Path) -> Source | None:
    if not is_single_file(settings.model):
        return None
    convert_file(Path(settings.model), settings.from_file, folder)
    return load_source(folder, named=settings.model)


def _write_notice(settings: TrainingSettings, source: Source, folder: Path) -> None:
    """A notice says what was changed, behind the model's own."""
    own = folder / "NOTICE"
    carried = own.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if own.is_file() else ""
    names = ", ".join(f"{lora.path.name} ({lora.weight:g})" for lora in settings.loras)
    atomic_write_text(own, f"{carried}{source.model} with adapters fused into its weights: {names}.\n")


def _recorded(folder: RunFolder) -> dict[str, Any]:
    """What the file says that is written last, so that a model that has it is whole, and ours; empty without it."""
    try:
        record = json.loads(folder.prepared.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("kind") == "sdq-model" else {}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
