"""NVIDIA's two libraries: one API, other names."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIBRARIES", "Library"]


@dataclass(frozen=True)
class Library:
    """One of the two libraries."""

    engine: str
    module: str
    distribution: str
    extra: str
    rtx: bool


LIBRARIES = {
    "tensorrt": Library("tensorrt", "tensorrt", "tensorrt", "tensorrt", rtx=False),
    "tensorrt-rtx": Library("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx", "rtx", rtx=True),
}
