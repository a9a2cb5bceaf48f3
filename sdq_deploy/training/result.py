"""What every method leaves behind in the fit folder: the best state, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sdq_engines.files import atomic_write, atomic_write_json

__all__ = ["BEST", "RESULT", "read_result", "write_result"]

BEST, RESULT = "best.safetensors", "result.json"


def write_result(folder: Path, tensors: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
    """Keep this state as the best so far.

    Args:
        folder: the run's fit folder.
        tensors: of the quantized checkpoint.
        result: start_db and best_db, the held-out trajectory SNR at the start and of this state; best_step, the
            iteration that it was reached at; and what the method has to add, JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / BEST) as temporary:
        save_file(dict(tensors), temporary, metadata={"step": str(result["best_step"])})
    atomic_write_json(folder / RESULT, dict(result))


def read_result(folder: Path) -> dict[str, Any]:
    """What `write_result` was told last."""
    result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result
