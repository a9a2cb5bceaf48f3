"""Add an engine to a package. A compiler runs in a child process: if it crashes, the package is as it was.

package = build_engine(open_package("package"), "tensorrt-rtx", ShapeProfile(batch_max=4))
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdq_engines.backends.base import SM_OPTION
from sdq_engines.backends.registry import AUTO, ENGINE_NAMES, backend, check_engine_name, fastest
from sdq_engines.backends.supported import refusal, require_architectures, require_engine
from sdq_engines.build_child import run_job
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import ENGINES, engine_folder
from sdq_engines.package.links import require_plain_weights
from sdq_engines.package.schema import EngineEntry, KernelCounts, Manifest, ShapeProfile
from sdq_engines.package.store import Package, read_manifest
from sdq_engines.process import PeakMemory, how_it_died
from sdq_engines.sizes import check_sizes

__all__ = ["Progress", "build_engine", "check_options", "choose_engine"]

#: Called with the component and what is being done to it, when that changes.
Progress = Callable[[str, str], None]

_STAGING = ".building-"
_LOG_LINES = 12
_POLL_SECONDS = 0.05
_OPENED_HERE_BYTES = 1 << 28
"""An engine that compiles nothing opens the package's graphs, as parity has done and every run will do. Up to this size
it does so in this process, for a child takes longer to start than they to open; beyond, in a child, which gives the
memory back."""


def choose_engine(name: str, precision: str = "") -> str:
    """`name` itself after a check, or for "auto" the fastest engine that can be built and run on this machine.

    Args:
        name: an engine's, or "auto".
        precision: of the package that it is for; what cannot compute it is not chosen. "" where that is not known yet.

    Raises:
        SdqError: unknown name; it cannot compute the precision; or nothing works here, with what each engine lacks.
    """
    check_engine_name(name)
    if name != AUTO:
        require_engine(name, precision)
    if importlib.util.find_spec("onnx_ir") is None:
        raise SdqError("Building needs onnx-ir, which is not installed.", "pip install 'sdq-deploy[build]'")
    if name != AUTO:
        found = backend(name).available()
        if not found.builds:
            raise SdqError(f"{name} cannot build here: {found.reason or 'polygraphy is not installed'}.", found.hint)
        return name
    chosen, seen = fastest([each for each in ENGINE_NAMES if not refusal(each, precision)], to_build=True)
    if chosen is None:
        why = "; ".join(f"{engine}: {found.reason}" for engine, found in seen.items())
        raise SdqError(f"No engine works on this machine ({why}).", "pip install 'sdq-deploy[cpu]'")
    return chosen


def build_engine(
    package: Package,
    engine: str,
    profile: ShapeProfile | None = None,
    options: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Package:
    """Build `engine` ("auto" allowed) and list it in the manifest; an engine of the same name is replaced.

    Args:
        package: a checked package (`open_package`).
        engine: a name of `backends.registry`.
        profile: images per call, by default one, up to four, tuned for one; and sizes, by default the package's.
        options: of the backend, e.g. {"fp32": ["vae_decoder"]}, {"sm": [89, 120]}.
        on_progress: hears the component and stage.

    Returns:
        The package with its new manifest.

    Raises:
        SdqError: unknown engine, its library is missing, the builder refused or crashed (with the end of its log), or
            the package cannot be written; an option that this engine does not have. The package is then as it was.
    """
    engine = choose_engine(engine, package.manifest.precision)
    require_architectures(engine, package.manifest.precision, (options or {}).get(SM_OPTION, ()))
    profile = profile or ShapeProfile()
    if not profile.batch_min <= profile.batch_opt <= profile.batch_max:
        raise SdqError(
            f"Batch min {profile.batch_min}, opt {profile.batch_opt} and max {profile.batch_max} are not in order.",
            "Give --batch-min <= --batch-opt <= --batch-max.",
        )
    check_sizes(package, profile)
    require_plain_weights(package.folder, package.manifest.components.values())
    check_options(options or {}, [engine])
    with _staging(package) as folder:
        job = {
            "package": str(package.folder.resolve()),
            "engine": engine,
            "profile": profile.model_dump(),
            "options": options or {},
        }
        small = package.manifest.bytes_without_engines <= _OPENED_HERE_BYTES
        here = small and not backend(engine).compiles
        try:
            result = (_run_here if here else _run_child)(folder, job, on_progress)
        except SdqError:
            _require_same_graphs(package, read_manifest(package.folder), engine)
            raise
        return _adopt(package, engine, profile, result, folder / "out")


def check_options(options: Mapping[str, Any], engines: Sequence[str]) -> None:
    """Refuse an option that none of these engines honours.

    Raises:
        SdqError: there is one; it would have changed nothing.
    """
    honoured = {option for engine in engines for option in backend(engine).build_options}
    for option in options:
        if option not in honoured:
            raise SdqError(
                f"--{option} changes nothing for {' and '.join(engines)}.",
                f"Leave --{option} out, or name an engine that honours it.",
            )


@contextlib.contextmanager
def _staging(package: Package) -> Iterator[Path]:
    """A folder in the package for the child to work in; gone at the end, whatever happened."""
    engines = package.folder / ENGINES
    existed = engines.is_dir()
    folder = engines / f"{_STAGING}{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
        for stale in engines.glob(f"{_STAGING}*"):  # of a build that was killed
            if stale != folder and time.time() - stale.stat().st_mtime > 24 * 3600:
                shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise SdqError(f"The package at {package.folder} cannot be written: {error.strerror or error}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not any(engines.iterdir()):
            engines.rmdir()


def _run_here(folder: Path, job: dict[str, Any], on_progress: Progress | None) -> dict[str, Any]:
    with (folder / "builder.log").open("w", encoding="utf-8") as log:
        result = run_job(folder, job, on_progress or (lambda component, stage: None), log)
    return _require_built(folder, result)


def _require_built(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        raise SdqError(result["error"], _hint(folder, result["hint"]))
    return result


def _run_child(folder: Path, job: dict[str, Any], on_progress: Progress | None) -> dict[str, Any]:
    engine = job["engine"]
    atomic_write_json(folder / "job.json", job)
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if engine == "tensorrt-rtx" else "0"}
    with (folder / "builder.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "sdq_engines.build_child", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,  # nothing is written; it ends when this process does, however that dies
            env=environment,
        )
        last, memory = "", PeakMemory(child.pid)
        try:
            for component, stage in _events(folder / "events.jsonl", child, memory):
                last = f"{stage} {component}"
                if on_progress is not None:
                    on_progress(component, stage)
        except BaseException:
            child.kill()
            child.wait()
            raise
    if (folder / "result.json").is_file():
        return _require_built(folder, json.loads((folder / "result.json").read_text(encoding="utf-8")))
    died = how_it_died(child.returncode, memory.bytes) or f"stopped with exit code {child.returncode}"
    raise SdqError(
        f"The builder of {engine} {died} while {last or 'starting'}; the package is as it was.",
        _hint(folder, "Try again with more free memory or --batch-max 1, or another engine: sdq-deploy doctor"),
    )


def _events(path: Path, child: subprocess.Popen[bytes], memory: PeakMemory) -> Iterator[tuple[str, str]]:
    """What the child reports, as it reports it, until it ends; its memory is looked at meanwhile."""
    position, running = 0, True
    while running:
        running = child.poll() is None
        memory.look()
        if path.is_file():
            with path.open("rb") as handle:
                handle.seek(position)
                written = handle.read()
            whole = written[: written.rfind(b"\n") + 1]  # the child may be in the middle of a line
            position += len(whole)
            for line in whole.splitlines():
                event = json.loads(line)
                yield event["component"], event["stage"]
        if running:
            time.sleep(_POLL_SECONDS)


def _hint(folder: Path, advice: str) -> str:
    text = (folder / "builder.log").read_text(encoding="utf-8", errors="replace")
    text = text.split("Traceback (most recent call last)")[0]  # of Python's own; the message has its gist
    lines = [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
    log = "\n".join(f"  | {line[:300]}" for line in lines)
    return f"{advice}\nThe builder's log ended with:\n{log}" if lines else advice


def _adopt(package: Package, engine: str, profile: ShapeProfile, result: dict[str, Any], out: Path) -> Package:
    """Move the child's files into the package under a fresh name, then let the manifest point at them."""
    folder = f"{engine_folder(engine)}/{uuid.uuid4().hex[:8]}"
    made = {component: file for component, file in result["components"].items() if file is not None}
    entry = EngineEntry(
        backend=engine,
        version=result["version"],
        target=result["target"],
        profile=profile,
        components={
            component: f"{folder}/{made[component]}" if component in made else package.manifest.components[component]
            for component in result["components"]
        },
        options=result["options"],
        kernels=KernelCounts(**result["kernels"]) if result["kernels"] else None,
        build_seconds=result["build_seconds"],
        peak_memory_bytes=result["peak_memory_bytes"],
        bytes_on_disk=sum((out / file).stat().st_size for file in made.values()),
    )
    # the manifest as it is now: another engine may have been added while this one was built
    with PackageEditor.edit(package.folder, f"build of {engine}") as editor:
        _require_same_graphs(package, editor.current, engine)
        for file in made.values():
            editor.move_file(f"{folder}/{file}", out / file)
        for old in editor.current.files:
            if old.startswith(f"{engine_folder(engine)}/"):
                editor.drop(old)
        engines = {**editor.current.engines, engine: entry}
        changed = editor.commit(editor.current.model_copy(update={"engines": engines}))
        editor.sweep(engine_folder(engine))
        return changed


def _require_same_graphs(package: Package, current: Manifest, engine: str) -> None:
    """Raises: SdqError: the package was exported again since it was opened; the engine is of its former graphs."""
    if package.manifest.files_without_engines != current.files_without_engines:
        raise SdqError(
            f"The package at {package.folder} was exported again while its {engine} engine was built.",
            f"Build it once more: sdq-deploy build {package.folder} --engine {engine}",
        )
