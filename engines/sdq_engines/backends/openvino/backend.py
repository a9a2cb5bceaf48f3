"""OpenVINO on the CPU: INT8 convolutions and matrix products straight from the Q/DQ graph.

Compiled once at build and exported as a blob per component, which opens an order of magnitude faster than compiling the
graph. Two properties keep it faithful (docs/benchmarks.md): `INFERENCE_PRECISION_HINT=f32`, since the default may
compute in BF16, and `DYNAMIC_QUANTIZATION_GROUP_SIZE=0`, since it would else quantize activations of INT4 layers.
The one thing in BF16 is the long self-attention of quantized denoisers (`lowering/bf16_attention.py`).
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdq_engines.backends.base import (
    FP32_OPTION,
    Availability,
    BuildJob,
    BuildResult,
    require_working,
    threads_of,
)
from sdq_engines.backends.openvino.library import DEVICE, PROPERTIES, openvino
from sdq_engines.backends.openvino.session import OpenVinoSession
from sdq_engines.backends.profiles import extents, fixed_size, input_dims
from sdq_engines.errors import SdqError
from sdq_engines.memory import give_back_memory
from sdq_engines.package.layout import DENOISER, VAE_DECODER

if TYPE_CHECKING:
    import onnx_ir as ir

    from sdq_engines.package.schema import EngineEntry, KernelCounts
    from sdq_engines.package.store import Package

__all__ = ["OpenVinoBackend", "make"]


def make(name: str) -> OpenVinoBackend:
    """The backend (there is one name)."""
    return OpenVinoBackend()


class OpenVinoBackend:
    """See the module. Load option: `threads`."""

    name = "openvino"
    build_options: tuple[str, ...] = (FP32_OPTION,)
    load_options: tuple[str, ...] = ("threads",)
    compiles = True

    def available(self) -> Availability:
        hint = "pip install 'sdq-deploy[cpu]'"
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, reason="openvino is not installed", hint=hint)
        try:
            ov = openvino()

            device = str(ov.Core().get_property(DEVICE, "FULL_DEVICE_NAME")).strip()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return Availability(False, reason=f"openvino does not load: {error}", hint=hint)
        return Availability(True, version=ov.get_version(), device=device, builds=True)

    def lowering(self, component: str, options: Mapping[str, Any]) -> list[ir.passes.PassBase]:
        """INT4 weights of INT8 layers are widened: OpenVINO has no INT8 x INT4 kernel and would compute in FP32."""
        from sdq_engines.lowering.widen_int4 import WidenInt4

        return [WidenInt4()] if component == DENOISER else []

    def build(self, job: BuildJob) -> BuildResult:
        ov = openvino()

        files: dict[str, str | None] = {}
        kernels: KernelCounts | None = None
        core = ov.Core()
        for component in job.package.manifest.components:
            job.progress(component, "lowering")
            size = fixed_size(component, job.profile, job.package.manifest.io)
            lowering = self.lowering(component, job.options)
            path = _lowered(job, component, [*size, *lowering, *_attention(job, component), *_mapped(job, component)])
            give_back_memory()
            job.progress(component, "compiling")
            model = core.read_model(str(path))
            _fix_shapes(model, path, component, job)
            compiled = core.compile_model(model, DEVICE, PROPERTIES)
            if component == DENOISER:
                kernels = _count(job.package, compiled)
            job.progress(component, "exporting")
            files[component] = f"{component}.blob"
            with (job.out / f"{component}.blob").open("wb") as blob:
                blob.write(_bytes(compiled.export_model()))
        recorded = {FP32_OPTION: job.options[FP32_OPTION]} if job.options.get(FP32_OPTION) else {}
        return BuildResult(files, ov.get_version(), f"{platform.machine()} CPU", recorded, kernels)

    def load(self, package: Package, entry: EngineEntry, options: Mapping[str, Any]) -> OpenVinoSession:
        found = require_working(self)
        rebuild = f"Build it here: sdq-deploy build {package.folder} --engine openvino"
        if entry.version != found.version:
            raise SdqError(
                f"The openvino engine was built by OpenVINO {entry.version}; here is {found.version}.", rebuild
            )
        here = f"{platform.machine()} CPU"
        if entry.target != here:
            raise SdqError(f"The openvino engine was built for: {entry.target}; here is: {here}.", rebuild)
        return OpenVinoSession(package, entry, threads_of(options))


def _attention(job: BuildJob, component: str) -> list[ir.passes.PassBase]:
    """Long self-attention of a quantized denoiser in BF16, unless the job asks for FP32."""
    from sdq_engines.lowering.bf16_attention import Bf16Attention

    quantized = component == DENOISER and job.package.manifest.is_quantized
    return [Bf16Attention()] if quantized and DENOISER not in job.options.get(FP32_OPTION, ()) else []


def _mapped(job: BuildJob, component: str) -> list[ir.passes.PassBase]:
    """Large weights, which are stored beside the graph, written as FP32: OpenVINO then reads them where they lie.

    It would else keep an FP32 copy of FP16 ones in memory beside what it compiles of them: 3.2 GB of Stable Diffusion
    v1-4's.
    """
    from sdq_engines.lowering.fold_fp16_storage import FoldFp16Storage

    graph = job.package.component(component)
    return [FoldFp16Storage()] if graph.with_name(f"{graph.name}.data").is_file() else []


def _lowered(job: BuildJob, component: str, passes: list[ir.passes.PassBase]) -> Path:
    """The component's graph after `passes`, written beside the job; the canonical file where there is nothing to do."""
    canonical = job.package.component(component)
    if not passes:
        return canonical
    from sdq_engines.lowering.graph import apply, load_graph
    from sdq_engines.lowering.save import save_graph

    return save_graph(apply(load_graph(canonical), passes), job.out / "work" / component)


def _fix_shapes(model: Any, path: Path, component: str, job: BuildJob) -> None:
    """For a profile of one batch size: static shapes, which OpenVINO runs 10 to 20 % faster. Free sizes get bounds."""
    from sdq_engines.lowering.graph import load_graph

    profile, io, ov = job.profile, job.package.manifest.io, openvino()
    fixed = profile.batch_min == profile.batch_max and component in (DENOISER, VAE_DECODER)
    if not fixed and not io.size_multiple:
        return
    free = extents(component, profile, io)

    def dimension(dim: int | str) -> Any:
        if isinstance(dim, int):
            return ov.Dimension(dim)
        if "batch" in dim and not fixed:
            return ov.Dimension.dynamic()
        low, _, high = free[dim]
        return ov.Dimension(low, high)

    dims = input_dims(load_graph(path))
    model.reshape({name: ov.PartialShape([dimension(dim) for dim in shape]) for name, shape in dims.items()})


def _count(package: Package, compiled: Any) -> KernelCounts | None:
    from sdq_engines.backends.kernels import count, openvino_layers

    return count(package, openvino_layers(compiled))


def _bytes(exported: Any) -> memoryview:
    """What was exported, without a copy: of Stable Diffusion v1-4 that would be 3.4 GB more."""
    return exported.getbuffer() if hasattr(exported, "getbuffer") else memoryview(exported)
