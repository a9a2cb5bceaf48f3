"""The training log: JSON lines and TensorBoard, the same numbers in both."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from sdq_engines.files import atomic_write_text

__all__ = ["LOG_FILE", "TrainingLog", "read_log"]

LOG_FILE = "train.jsonl"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Every record of a log folder, oldest first; a line cut short by a kill is left out."""
    path = folder / LOG_FILE
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class TrainingLog:
    """Writes one record per iteration or validation. Records after `from_step` are dropped: they are made again.

    Args:
        folder: where train.jsonl and TensorBoard's event files go.
        from_step: the step that training continues from; 0 begins a new log.
        enabled: False in all but the main process.
    """

    def __init__(self, folder: Path, from_step: int, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read_log(folder) if record["step"] <= from_step and from_step > 0]
        folder.mkdir(parents=True, exist_ok=True)
        if not from_step:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        atomic_write_text(folder / LOG_FILE, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = (folder / LOG_FILE).open("a", encoding="utf-8", newline="\n")
        self.board = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one record."""
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
