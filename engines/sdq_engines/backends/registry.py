"""Engines by name, and which of them `auto` takes."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from sdq_engines.backends.base import Availability, Backend
from sdq_engines.errors import SdqError

__all__ = ["AUTO", "ENGINE_NAMES", "backend", "check_engine_name", "fastest"]

AUTO = "auto"

#: Fastest first: this is the order of `auto`. On a CPU, OpenVINO has INT8 convolution kernels for Q/DQ graphs and ONNX
#: Runtime has none (docs/benchmarks.md); TensorRT tunes for the GPU that it is built on, TensorRT-RTX at load.
_HOMES = {
    "tensorrt": "sdq_engines.backends.nvidia.backend",
    "tensorrt-rtx": "sdq_engines.backends.nvidia.backend",
    "openvino": "sdq_engines.backends.openvino.backend",
    "onnxruntime": "sdq_engines.backends.onnxruntime",
}
ENGINE_NAMES = tuple(_HOMES)


def check_engine_name(name: str) -> None:
    """Raises: SdqError: there is no engine of this name."""
    if name not in (*ENGINE_NAMES, AUTO):
        close = difflib.get_close_matches(str(name), ENGINE_NAMES, n=1, cutoff=0.5)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise SdqError(f"There is no engine {name!r}.{guess}", f"Engines: {', '.join((*ENGINE_NAMES, AUTO))}.")


def backend(name: str) -> Backend:
    """The backend of this name; imports its module, not yet its library."""
    check_engine_name(name)
    made: Backend = importlib.import_module(_HOMES[name]).make(name)
    return made


def fastest(
    candidates: Iterable[str] = ENGINE_NAMES, to_build: bool = False
) -> tuple[str | None, dict[str, Availability]]:
    """The first engine, in the order of `auto`, that runs on this machine, and what was found about each one tried.

    `to_build` asks that it can also be built here.
    """
    wanted, seen = set(candidates), {}
    for name in ENGINE_NAMES:
        if name not in wanted:
            continue
        seen[name] = found = backend(name).available()
        if found.works and (found.builds or not to_build):
            return name, seen
    return None, seen
