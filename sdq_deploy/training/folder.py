"""The run folder: every file name of a training run, spelled once, and its status file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json
from sdq_engines.in_progress import what_was_killed

__all__ = ["RunFolder"]


class RunFolder:
    """Paths inside RUN and the reading and writing of run.json.

    run.json: {"kind": "sdq-run", "status": "complete" or the stage under way, "settings": {...},
    "method": ..., "stages": {name: {"inputs": hash, "done": bool, "seconds": float, "measured": {...} or absent}}}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status_file = path / "run.json"
        self.model = path / "model"
        self.prepared = self.model / "prepared.json"
        self.embeddings = path / "embeddings.safetensors"
        self.dataset = path / "dataset"
        self.scales = path / "scales.safetensors"
        self.sensitivity = path / "sensitivity.json"
        self.fit = path / "fit"
        self.log = path / "log"
        self.curves = path / "curves.png"

    def read_status(self) -> dict[str, Any]:
        """What run.json says; a new run's where there is none.

        Raises:
            SdqError: it cannot be read, or is no run's.
        """
        if not self.status_file.is_file():
            return {"kind": "sdq-run", "status": "new", "settings": {}, "stages": {}}
        hint = "Train it again, into another folder or after you have emptied this one."
        try:
            status = json.loads(self.status_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SdqError(f"{self.status_file} cannot be read: {error}.", hint) from error
        if not isinstance(status, dict) or "status" not in status:
            raise SdqError(f"{self.status_file} is not what a training writes.", hint)
        return {"settings": {}, "stages": {}, **status}

    def read_identity(self) -> str | None:
        """Hash of the model that the user named, as recorded."""
        identity: str | None = self.read_status()["settings"].get("identity")
        return identity

    def require_finished(self) -> None:
        """A folder without run.json, such as a checkpoint's own, has nothing to finish.

        Raises:
            SdqError: the training is not complete, or run.json cannot be read.
        """
        if not self.status_file.is_file():
            return
        status = self.read_status()["status"]
        if status != "complete":
            killed = what_was_killed(self.path)
            raise SdqError(
                f"The training in {self.path} is not finished: " + (killed or f"it stopped in the stage {status!r}."),
                f"Finish it: sdq-deploy train MODEL --out {self.path} --resume",
            )

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.status_file, status)
