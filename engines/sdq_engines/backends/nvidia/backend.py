"""The two NVIDIA engines behind the backends' protocol; TensorRT-RTX also builds where there is no GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdq_engines.backends.base import (
    BF16_OPTION,
    FP32_OPTION,
    SM_OPTION,
    Availability,
    BuildJob,
    BuildResult,
    require_working,
)
from sdq_engines.backends.nvidia import cuda
from sdq_engines.backends.nvidia.library import LIBRARIES, Library
from sdq_engines.errors import SdqError
from sdq_engines.package.layout import DENOISER

if TYPE_CHECKING:
    import onnx_ir as ir

    from sdq_engines.backends.nvidia.session import NvidiaSession
    from sdq_engines.package.schema import EngineEntry
    from sdq_engines.package.store import Package

__all__ = ["NvidiaBackend", "make"]


def make(name: str) -> NvidiaBackend:
    """The backend of this engine name."""
    return NvidiaBackend(LIBRARIES[name])


class NvidiaBackend:
    """See the module. Build options: `fp32` and `bf16`, lists of components; of TensorRT-RTX `sm`, architectures."""

    load_options: tuple[str, ...] = ()
    compiles = True

    def __init__(self, library: Library) -> None:
        self.library, self.name = library, library.engine
        self.build_options: tuple[str, ...] = (FP32_OPTION, BF16_OPTION, *([SM_OPTION] if library.rtx else []))

    def available(self) -> Availability:
        version = self._installed()
        hint = f"pip install 'sdq-deploy[{self.library.extra}]'"
        if not version:
            return Availability(False, reason=f"{self.library.module} is not installed", hint=hint)
        device, why = cuda.find_gpu()
        builder = importlib.util.find_spec("polygraphy") is not None and importlib.util.find_spec("onnx_ir") is not None
        if device is None:
            mend = hint if "not installed" in why else "It runs on a machine with an NVIDIA GPU and its driver."
            return Availability(False, version, reason=why, hint=mend, builds=self.library.rtx and builder)
        return Availability(True, version, f"{device.name}, {device.architecture}", builds=builder)

    def _installed(self) -> str:
        """The library's version without importing its hundred megabytes; "" where it is not installed."""
        if importlib.util.find_spec(self.library.module) is None:
            return ""
        try:
            return importlib.metadata.version(self.library.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def lowering(self, component: str, options: Mapping[str, Any]) -> list[ir.passes.PassBase]:
        from sdq_engines.lowering.fold_fp16_storage import FoldFp16Storage
        from sdq_engines.lowering.fp16 import ToBFloat16, ToFloat16
        from sdq_engines.lowering.scalar_scales import ScalarScales
        from sdq_engines.lowering.widen_int4 import WidenInt4

        quantized = [WidenInt4(), ScalarScales()] if component == DENOISER else []
        if component in options.get(BF16_OPTION, ()):
            return [*quantized, ToBFloat16()]
        return [*quantized, FoldFp16Storage() if component in options.get(FP32_OPTION, ()) else ToFloat16()]

    def build(self, job: BuildJob) -> BuildResult:
        from sdq_engines.backends.nvidia.builder import build_plans

        return build_plans(job, self.library, self.lowering)

    def load(self, package: Package, entry: EngineEntry, options: Mapping[str, Any]) -> NvidiaSession:
        require_working(self)
        trt = importlib.import_module(self.library.module)
        rebuild = f"Build it here: sdq-deploy build {package.folder} --engine {self.name}"
        if trt.__version__ != entry.version:
            raise SdqError(
                f"The {self.name} engine was built by {self.name} {entry.version}; here is {trt.__version__}.",
                rebuild,
            )
        device, _ = cuda.find_gpu()
        assert device is not None
        if device.architecture not in re.findall(r"sm_\d+", entry.target):
            raise SdqError(
                f"The {self.name} engine was built for {entry.target}; this machine's {device.name} is "
                f"{device.architecture}.",
                rebuild,
            )
        from sdq_engines.backends.nvidia.session import NvidiaSession

        return NvidiaSession(self.library, trt, package, entry)
