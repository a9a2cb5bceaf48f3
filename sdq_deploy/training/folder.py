"""The run folder: every file name of a training run, spelled once, and its status file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json

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
        self.dataset = path / "dataset"
        self.scales = path / "scales.safetensors"
        self.sensitivity = path / "sensitivity.json"
        self.fit = path / "fit"
        self.log = path / "log"
        self.curves = path / "curves.png"

    def read_status(self) -> dict[str, Any]:
        """What run.json says; a new run's where there is none."""
        if not self.status_file.is_file():
            return {"kind": "sdq-run", "status": "new", "settings": {}, "stages": {}}
        status: dict[str, Any] = json.loads(self.status_file.read_text(encoding="utf-8"))
        return status

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
        try:
            status = self.read_status().get("status")
        except (OSError, ValueError, AttributeError) as error:
            raise SdqError(f"{self.status_file} cannot be read: {error}.", "Train it again.") from error
        if status != "complete":
            raise SdqError(
                f"The training in {self.path} is not finished: it stopped in the stage {status!r}.",
                f"Finish it: sdq-deploy train MODEL --out {self.path} --resume",
            )

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.status_file, status)
