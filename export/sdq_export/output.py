"""The output folder of an export: claimed at the start, written aside, put in the place of what is there at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_bytes, claimed_folder, folder_kind, remove_empty_parents
from sdq_engines.locks import MANIFEST_LOCK, sole_writer
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import LICENSE, MANIFEST, NOTICE, SAMPLER, model_file, tokenizer_file
from sdq_engines.package.paths import is_inside
from sdq_engines.package.schema import Manifest
from sdq_engines.package.store import Package, read_manifest
from sdq_export.parity.graphs import GraphFile, stage_graph
from sdq_export.provenance import notice
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.scratch import scratch_in
from sdq_export.source import Source

__all__ = ["claimed_output", "stage_component", "staged_path", "staging_folder", "write_files"]

_STAGING, _NEW = ".staging-", "new"


@contextlib.contextmanager
def claimed_output(out: str | Path) -> Iterator[Path]:
    """The output folder, checked at the start; if the export fails, it is again what it was."""
    with claimed_folder(out, "package", "export") as folder:
        was_package = folder_kind(folder) == "package"
        try:
            yield folder
        except BaseException:
            if not was_package:
                (folder / MANIFEST).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the package's files for what is not theirs yet; what a killed export left is removed.

    The output is marked as a package in the making before anything is put there, so that it can be claimed again.
    """
    if folder_kind(folder) != "package":
        PackageEditor.create(folder)
    for killed in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(killed, ignore_errors=True)
    staging = folder / f"{_STAGING}{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        with scratch_in(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def staged_path(staging: Path, name: str) -> Path:
    """A component's graph that `stage_component` has written."""
    return staging.joinpath(_NEW, *model_file(name).split("/"))


def stage_component(staging: Path, name: str, model: ir.Model) -> GraphFile:
    """Write a component's graph under its name in the package to be, and have it checked: the file that will ship."""
    file = stage_graph(model, staging / _NEW / name)
    onnx.checker.check_model(str(file.path), full_check=True)
    return file


def write_files(folder: Path, staging: Path, source: Source, plan: SamplerPlan, manifest: Manifest) -> Package:
    """Add the other files to the staged components, then put all in the place of what is there.

    A full disk is met before a package that is already here is touched.
    """
    _stage(staging / _NEW, source, plan, manifest)
    with sole_writer(folder, MANIFEST_LOCK, "export"):
        return _swap(folder, staging / _NEW, staging / "old", manifest)


def _swap(folder: Path, new: Path, old: Path, manifest: Manifest) -> Package:
    """Move the package's files out to `old` and those of `new` in, the manifest last.

    A failure or Ctrl-C on the way puts everything back; a kill leaves the package marked as incomplete.
    """
    marker, before = (folder / MANIFEST).read_bytes(), _files_of(folder)
    editor = PackageEditor.create(folder)
    try:
        for relative in before:
            _move(folder, old, relative)
        for file in sorted(path for path in new.rglob("*") if path.is_file()):
            editor.move_file(file.relative_to(new).as_posix(), file)
        return editor.commit(manifest)
    except BaseException:
        editor.abandon()
        for relative in before:
            _move(old, folder, relative)
        atomic_write_bytes(folder / MANIFEST, marker)
        raise


def _stage(staging: Path, source: Source, plan: SamplerPlan, manifest: Manifest) -> None:
    """Every file but the graphs and the manifest, under its name in the package."""
    files = {
        **{
            tokenizer_file(encoder.tokenizer): encoder.tokenizer_json().encode("utf-8")
            for encoder in source.family.text_encoders
        },
        SAMPLER: plan.to_bytes(),
        NOTICE: notice(source, manifest.source).encode("utf-8"),
    }
    if source.license_file is not None:
        files[LICENSE] = source.license_file.read_bytes()
    for relative, content in files.items():
        path = staging.joinpath(*relative.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _files_of(folder: Path) -> set[str]:
    """What the package that is here lists, but for names that lead outside of it."""
    with contextlib.suppress(SdqError):
        return {relative for relative in read_manifest(folder).files if is_inside(relative)}
    return set()


def _move(source: Path, target: Path, relative: str) -> None:
    """Move a file, if it is there, to the same place in another folder of this disk; no empty folder stays behind."""
    path, moved = (root.joinpath(*relative.split("/")) for root in (source, target))
    if path.is_file():
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, moved)
        remove_empty_parents(path, source)
