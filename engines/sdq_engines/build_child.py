"""The child process of a build: `python -m sdq_engines.build_child JOB_FOLDER`.

Reads job.json, appends events to events.jsonl, writes result.json. What the native builder prints goes to the log that
the parent made of stdout and stderr.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from sdq_engines.backends.base import BuildJob
from sdq_engines.backends.registry import backend
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package, read_manifest
from sdq_engines.process import peak_memory_bytes

__all__ = ["main"]


def main(folder: Path) -> int:
    """Build what job.json asks for; 0 if it was built, 1 if it was refused."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        result = _build(folder, job)
    except SdqError as error:
        result = {"error": error.message, "hint": error.hint}
    except MemoryError:
        result = {"error": f"{job['engine']} ran out of memory.", "hint": "Close other programs, or build elsewhere."}
    atomic_write_json(folder / "result.json", result)
    return 1 if "error" in result else 0


def _build(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    # The parent has verified the package just before.
    package = Package(Path(job["package"]), read_manifest(Path(job["package"])))
    out = folder / "out"
    out.mkdir()
    events = (folder / "events.jsonl").open("a", encoding="utf-8")

    def progress(component: str, stage: str) -> None:
        events.write(json.dumps({"component": component, "stage": stage}) + "\n")
        events.flush()

    started = time.monotonic()
    made = backend(job["engine"]).build(
        BuildJob(package, out, ShapeProfile(**job["profile"]), job["options"], progress)
    )
    seconds = time.monotonic() - started
    shutil.rmtree(out / "work", ignore_errors=True)
    events.close()
    result = dataclasses.asdict(made)
    result["kernels"] = made.kernels.model_dump() if made.kernels else None
    return {**result, "build_seconds": round(seconds, 3), "peak_memory_bytes": peak_memory_bytes()}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
