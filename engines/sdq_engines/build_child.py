"""A build, and its child process: `python -m sdq_engines.build_child JOB_FOLDER`.

The child reads job.json, appends events to events.jsonl, and writes result.json. What the native builder prints goes to
the log that the parent made of stdout and stderr. Its standard input stays empty and ends with the parent.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from sdq_engines.backends.base import BuildJob
from sdq_engines.backends.registry import backend
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package, read_manifest
from sdq_engines.process import peak_memory_bytes

__all__ = ["main", "run_job"]


def _end_with_parent() -> None:
    """A killed parent must not leave a builder behind that holds the machine for minutes."""
    os.read(sys.stdin.fileno(), 1)  # unbuffered: a lock held at the interpreter's end would be fatal
    os._exit(1)


def main(folder: Path) -> int:
    """Build what job.json asks for; 0 if it was built, 1 if it was refused."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    events = folder / "events.jsonl"

    def report(component: str, stage: str) -> None:
        with events.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"component": component, "stage": stage}) + "\n")

    result = run_job(folder, job, report, sys.stderr)
    atomic_write_json(folder / "result.json", result)
    return 1 if "error" in result else 0


def run_job(
    folder: Path, job: Mapping[str, Any], on_progress: Callable[[str, str], None], log: TextIO
) -> dict[str, Any]:
    """Build in this process, into FOLDER/out.

    Args:
        folder: the job's.
        job: what job.json holds: package, engine, profile, options.
        on_progress: hears the component and stage.
        log: for what a native library raised.

    Returns:
        The fields of BuildResult, `build_seconds` and `peak_memory_bytes` of this process; or `error` and `hint`.
    """
    stages = _Stages(on_progress)
    try:
        return _build(folder, job, stages)
    except SdqError as error:
        return {"error": error.message, "hint": error.hint}
    except MemoryError:
        return {"error": f"{job['engine']} ran out of memory.", "hint": "Close other programs, or build elsewhere."}
    except OSError as error:
        # The disk may have no room for result.json either; then the parent reads this from the log.
        print(f"{error.strerror or error}: {error.filename or folder}", file=log, flush=True)
        return {
            "error": f"{job['engine']} cannot write: {error.strerror or error}.",
            "hint": "Make room on the disk.",
        }
    except Exception as error:  # native bindings raise bare exceptions of many kinds
        print(traceback.format_exc(), file=log, flush=True)
        hint = "Try another engine or precision: sdq-deploy doctor"
        return {"error": f"{job['engine']} refuses {stages.component}: {_gist(error)}", "hint": hint}


class _Stages:
    """Reports each stage and remembers the component."""

    def __init__(self, report: Callable[[str, str], None]) -> None:
        self.report, self.component = report, "the package"

    def __call__(self, component: str, stage: str) -> None:
        self.component = component
        self.report(component, stage)


def _gist(error: Exception) -> str:
    """The last line of a native library's message, which says what is wrong; the first ones say where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__}"[:400]


def _build(folder: Path, job: Mapping[str, Any], stages: _Stages) -> dict[str, Any]:
    # The parent has verified the package just before.
    package = Package(Path(job["package"]), read_manifest(Path(job["package"])))
    out = folder / "out"
    out.mkdir()
    started = time.monotonic()
    made = backend(job["engine"]).build(BuildJob(package, out, ShapeProfile(**job["profile"]), job["options"], stages))
    seconds = time.monotonic() - started
    shutil.rmtree(out / "work", ignore_errors=True)
    result = dataclasses.asdict(made)
    result["kernels"] = made.kernels.model_dump() if made.kernels else None
    return {**result, "build_seconds": round(seconds, 3), "peak_memory_bytes": peak_memory_bytes()}


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(Path(sys.argv[1])))
