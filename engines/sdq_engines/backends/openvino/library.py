"""OpenVINO's Python module, where it computes, and the two properties that keep it faithful (docs/benchmarks.md)."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["DEVICE", "PROPERTIES", "openvino"]

DEVICE = "CPU"
PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "PERFORMANCE_HINT": "LATENCY",
}


def openvino() -> Any:
    """The module, without its telemetry: importing it would start a process that reports the import over the network.

    openvino falls back to a stub where `openvino_telemetry` cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")
