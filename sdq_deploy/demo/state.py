"""What the demo is asked for, and what its stages hand on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdq_deploy.demo.report import EngineFigures, Stage, Variant
from sdq_deploy.display.consoles import status_console

__all__ = ["Demo", "DemoSettings", "Images"]

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does and how much of it."""

    out: Path
    engines: tuple[str, ...] = ("onnxruntime", "openvino", "tensorrt-rtx")
    num_images: int = 64
    assignments: tuple[str, ...] = ()
    """Values of the recipe, KEY=VALUE each, for both precisions."""
    seed: int = 0


@dataclass
class Demo:
    """What the stages hand on."""

    settings: DemoSettings
    stages: list[Stage] = field(default_factory=list)
    images: dict[str, Images] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    engines: list[EngineFigures] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and record how long it took."""
        status_console.rule(f"[bold]{name}", align="left")
        started = time.perf_counter()
        yield
        self.stages.append(Stage(name=name, seconds=round(time.perf_counter() - started, 2)))
