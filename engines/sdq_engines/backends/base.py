"""What every backend offers, and what crosses between a backend and the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdq_engines.arguments import as_whole
from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    import onnx_ir as ir

    from sdq_engines.package.schema import EngineEntry, KernelCounts, ShapeProfile
    from sdq_engines.package.store import Package

__all__ = [
    "BF16_OPTION",
    "FP32_OPTION",
    "SM_OPTION",
    "Arrays",
    "Availability",
    "Backend",
    "BuildJob",
    "BuildResult",
    "Component",
    "Session",
    "Stepper",
    "check_load_options",
    "require_working",
    "threads_of",
]

Arrays = dict[str, np.ndarray]

#: Build option: the components that compute in FP32 what is not quantized, e.g. SDXL's VAE, whose activations leave
#: FP16's range.
FP32_OPTION = "fp32"

#: Build option of NVIDIA engines: the components that compute in BF16, FP32's range in half the bytes; it goes before
#: the package's `full_precision`.
BF16_OPTION = "bf16"

#: Build option of tensorrt-rtx: the NVIDIA architectures that the engine is for, as numbers, e.g. [89, 120].
SM_OPTION = "sm"


@dataclass(frozen=True)
class Availability:
    """Whether an engine works on this machine; `reason` and `hint` say why not and what to install."""

    works: bool
    version: str = ""
    device: str = ""
    reason: str = ""
    hint: str = ""
    builds: bool = False
    """Whether it can build here, which may need less than running (TensorRT-RTX builds without a GPU)."""


@dataclass(frozen=True)
class BuildJob:
    """One build, as the child process sees it."""

    package: Package
    out: Path
    """An empty folder; what is left in it, but for the logs, becomes the engine's files."""
    profile: ShapeProfile
    options: dict[str, Any] = field(default_factory=dict)
    progress: Callable[[str, str], None] = lambda component, stage: None
    """Called with a component's name and what is being done to it."""


@dataclass(frozen=True)
class BuildResult:
    """What a backend made: for each component a file in the job's folder, or None to load the canonical graph."""

    components: dict[str, str | None]
    version: str
    target: str
    options: dict[str, Any]
    kernels: KernelCounts | None


class Component(Protocol):
    """One loaded graph; may be run from several threads at once."""

    @property
    def inputs(self) -> Mapping[str, tuple[int | None, ...]]:
        """Name -> shape; None where a dimension is free."""
        ...

    @property
    def outputs(self) -> Sequence[str]:
        """Names."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Every output by its name. Feeds are cast to the engine's own types where they differ (FP32 to FP16)."""
        ...


class Stepper(Protocol):
    """A denoising run in progress for one batch: its state is its own, in the engine's memory.

    Of several runs on one engine, each in its thread, none sees another's state. A GPU's engine makes them one after
    the other, so a run must be closed.
    """

    def step(self, index: int, noise: np.ndarray | None) -> None:
        """Make model call `index` (0..T-1); `noise` [batch, C, h, w] for stochastic samplers, else None."""
        ...

    def latents(self) -> np.ndarray:
        """The latents now, FP32 [batch, C, h, w], copied to the host."""
        ...

    def replace(self, latents: np.ndarray) -> None:
        """Go on from other latents, FP32 [batch, C, h, w]; the sampler's history stays."""
        ...

    def close(self) -> None:
        """End the run."""
        ...


class Session(Protocol):
    """A loaded engine of one package; its components and runs may be asked for from several threads at once."""

    name: str
    entry: EngineEntry

    def component(self, name: str) -> Component:
        """The component's graph, loaded on first use."""
        ...

    def stepper(self, latents: np.ndarray, guidance_scale: float, coefficients: np.ndarray, prompt: Arrays) -> Stepper:
        """Start a run; close it (`contextlib.closing`).

        Args:
            latents: FP32 [batch, C, h, w], noise already scaled by the sampler's initial sigma.
            guidance_scale: of classifier-free guidance.
            coefficients: FP32 [T, R], one row per model call.
            prompt: what stays the same in every step: the prologue's outputs, [2*batch, L, inner] each; for an
                inpainting denoiser `extra_channels` as well.
        """
        ...


class Backend(Protocol):
    """An engine's module: `backends.registry` finds it by name."""

    name: str

    build_options: tuple[str, ...]
    """Which of the options of `sdq_engines.build.build_engine` it honours."""

    load_options: tuple[str, ...]
    """Which options `load` takes."""

    compiles: bool
    """Whether `build` runs a compiler, which may crash and take much memory; if not, it only opens the graphs."""

    def available(self) -> Availability:
        """Whether it works here; never raises, imports the backend's library."""
        ...

    def lowering(self, component: str, options: Mapping[str, Any]) -> list[ir.passes.PassBase]:
        """The passes that turn this component's canonical graph into what the engine wants, in order."""
        ...

    def build(self, job: BuildJob) -> BuildResult:
        """Build every component; runs in a child process (see `sdq_engines.build`)."""
        ...

    def load(self, package: Package, entry: EngineEntry, options: Mapping[str, Any]) -> Session:
        """Open an engine of a checked package.

        Raises:
            SdqError: built for another version or device than this machine has; with the command that mends it.
        """
        ...


def check_load_options(engine: Backend, options: Mapping[str, Any]) -> None:
    """Raises: SdqError: an option of `Pipeline.load` that this engine does not take; it would have changed nothing."""
    for name in options:
        if name not in engine.load_options:
            close = difflib.get_close_matches(name, engine.load_options, n=1, cutoff=0.6)
            guess = f" Did you mean {close[0]!r}?" if close else ""
            takes = ", ".join(engine.load_options) or "none"
            raise SdqError(
                f"The engine {engine.name} takes no option {name!r}.{guess}", f"Options of {engine.name}: {takes}."
            )


def threads_of(options: Mapping[str, Any]) -> int | None:
    """The option `threads`; None, as 0, leaves their number to the engine.

    Raises:
        SdqError: it is no whole number from 0 on.
    """
    threads = options.get("threads")
    if threads is None:
        return None
    number = as_whole(threads, "threads")
    if number < 0:
        raise SdqError(
            f"threads is {number}; a whole number from 1 on is wanted.", "Leave it out for the engine's own."
        )
    return number or None


def require_working(engine: Backend) -> Availability:
    """What is here to run the engine.

    Raises:
        SdqError: it does not work on this machine, and why.
    """
    found = engine.available()
    if not found.works:
        raise SdqError(f"The engine {engine.name} does not work here: {found.reason}.", found.hint)
    return found
