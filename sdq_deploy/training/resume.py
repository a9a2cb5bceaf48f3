"""The resume point of a fit: written whole or not at all, and read only by the fit that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdq_engines.files import atomic_write

__all__ = ["drop_resume", "read_resume", "write_resume"]

_FILE = "resume.pt"


def write_resume(folder: Path, inputs: str, state: dict[str, Any]) -> None:
    """Replace the resume point in `folder`; `inputs` is the hash of all that the fit depends on."""
    with atomic_write(folder / _FILE) as temporary:
        torch.save({"inputs": inputs, **state}, temporary)


def read_resume(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The state to continue from, on the CPU; None where there is none, or one made from other inputs."""
    path = folder / _FILE
    if not path.is_file():
        return None
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return saved if saved["inputs"] == inputs else None


def drop_resume(folder: Path) -> None:
    """The fit has ended."""
    (folder / _FILE).unlink(missing_ok=True)
