"""Which engines work on this machine, and what the others lack."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from sdq_engines.backends.base import Availability
from sdq_engines.backends.registry import ENGINE_NAMES, backend, fastest

__all__ = ["Diagnosis", "diagnose"]

_PACKAGES = (
    "sdq-deploy",
    "numpy",
    "onnx",
    "onnx-ir",
    "polygraphy",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "tensorrt",
    "cuda-python",
    "torch",
    "diffusers",
)


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    python: str
    platform: str
    versions: dict[str, str | None]
    """Distribution -> version, None where it is not installed."""
    engines: dict[str, Availability]
    auto: str | None
    """The engine that `auto` takes here."""


def diagnose() -> Diagnosis:
    """Look at every engine; imports those libraries that are installed."""
    engines = {name: backend(name).available() for name in ENGINE_NAMES}
    chosen, _ = fastest(name for name, found in engines.items() if found.works)
    return Diagnosis(
        python=sys.version.split()[0],
        platform=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in _PACKAGES},
        engines=engines,
        auto=chosen,
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
