"""OpenVINO on the CPU: INT8 convolutions and matrix products straight from the Q/DQ graph.

Compiled once at build and exported as a blob per component, which opens an order of magnitude faster than compiling the
graph. Two properties keep it faithful (docs/benchmarks.md): `INFERENCE_PRECISION_HINT=f32`, since the default may
compute in BF16, and `DYNAMIC_QUANTIZATION_GROUP_SIZE=0`, since it would else quantize activations of INT4 layers.
The one thing in BF16 is the long self-attention of quantized denoisers (`lowering/bf16_attention.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.backends.base import (
    FP32_OPTION,
    Arrays,
    Availability,
    BuildJob,
    BuildResult,
    require_working,
    threads_of,
)
from sdq_engines.backends.profiles import extents, fixed_size, input_dims
from sdq_engines.errors import SdqError
from sdq_engines.memory import give_back_memory
from sdq_engines.package.held import hold
from sdq_engines.package.layout import DENOISER, VAE_DECODER

if TYPE_CHECKING:
    import onnx_ir as ir

    from sdq_engines.package.schema import EngineEntry, KernelCounts
    from sdq_engines.package.store import Package

__all__ = ["OpenVinoBackend", "OpenVinoComponent", "OpenVinoSession", "OpenVinoStepper", "make"]

DEVICE = "CPU"
PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "PERFORMANCE_HINT": "LATENCY",
}


def _openvino() -> Any:
    """The module, without its telemetry: importing it would start a process that reports the import over the network.

    openvino falls back to a stub where `openvino_telemetry` cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


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
            ov = _openvino()

            device = str(ov.Core().get_property(DEVICE, "FULL_DEVICE_NAME")).strip()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return Availability(False, reason=f"openvino does not load: {error}", hint=hint)
        return Availability(True, version=ov.get_version(), device=device, builds=True)

    def lowering(self, component: str, options: Mapping[str, Any]) -> list[ir.passes.PassBase]:
        """INT4 weights of INT8 layers are widened: OpenVINO has no INT8 x INT4 kernel and would compute in FP32."""
        from sdq_engines.lowering.widen_int4 import WidenInt4

        return [WidenInt4()] if component == DENOISER else []

    def build(self, job: BuildJob) -> BuildResult:
        ov = _openvino()

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

    profile, io, ov = job.profile, job.package.manifest.io, _openvino()
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


class OpenVinoComponent:
    """One compiled graph and one infer request, which serves one call at a time.

    A call takes all cores, so a second request would take memory and make nothing faster.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        self._bound: object = None
        """Whose buffers the request reads."""
        self._shapes = {port.get_any_name(): port.get_partial_shape() for port in compiled.inputs}
        self.inputs = {name: _known(shape) for name, shape in self._shapes.items()}
        self.outputs = [port.get_any_name() for port in compiled.outputs]

    def check(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Raises: SdqError: an input of a shape that this engine was not built for."""
        ov = _openvino()

        for name, value in feeds.items():
            shape = self._shapes[name]
            if not shape.compatible(ov.PartialShape(list(value.shape))):
                raise SdqError(
                    f"The openvino engine was built for {name} of shape {shape}; {list(value.shape)} was asked for.",
                    "Ask for as many images as it was built for, or build it with another --batch-max or --size.",
                )

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        wanted = {name: value for name, value in feeds.items() if name in self.inputs}
        self.check(wanted)
        with self._lock:
            self._bound = None
            results = self._request.infer(wanted, share_inputs=True)
            return {name: np.array(results[name]) for name in self.outputs}

    def infer_in_place(self, buffers: Arrays, state: Mapping[str, np.ndarray]) -> None:
        """One call on buffers that stay the same from call to call: bound once, and again after another's call.

        Args:
            buffers: every input by name.
            state: output's name -> the array that it is copied into.
        """
        with self._lock:
            if self._bound is not buffers:
                for name, buffer in buffers.items():
                    self._request.set_tensor(name, _tensor(buffer))
                self._bound = buffers
            self._request.infer()
            for name, target in state.items():
                target[...] = self._request.get_tensor(name).data


def _known(shape: Any) -> tuple[int | None, ...]:
    return tuple(dim.get_length() if dim.is_static else None for dim in shape)


class OpenVinoSession:
    """The package's blobs, each imported on first use."""

    name = "openvino"

    def __init__(self, package: Package, entry: EngineEntry, threads: int | None) -> None:
        ov = _openvino()

        self.package, self.entry = package, entry
        self._core = ov.Core()
        self._properties = {**PROPERTIES, **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})}
        self._files = hold(package.folder, package.files_of(entry))
        self._components: dict[str, OpenVinoComponent] = {}
        self._blobs: list[np.ndarray] = []
        """What the compiled graphs read their weights from."""
        self._opening = threading.Lock()

    def component(self, name: str) -> OpenVinoComponent:
        with self._opening:
            if name not in self._components:
                self._components[name] = OpenVinoComponent(self._import(name))
            return self._components[name]

    def _import(self, name: str) -> Any:
        blob = self._files[self.entry.components[name]].map()
        self._blobs.append(blob)
        try:
            return self._core.import_model(_tensor(blob), DEVICE, self._properties)
        except RuntimeError as error:
            raise SdqError(
                f"OpenVINO refuses its own blob of {name}: {str(error).splitlines()[-1]}",
                f"Build it again: sdq-deploy build {self.package.folder} --engine openvino",
            ) from error

    def stepper(
        self, latents: np.ndarray, guidance_scale: float, coefficients: np.ndarray, prompt: Arrays
    ) -> OpenVinoStepper:
        return OpenVinoStepper(self.component(DENOISER), latents, guidance_scale, coefficients, prompt)


class OpenVinoStepper:
    """A run on buffers of its own; a step writes a few kilobytes and infers."""

    def __init__(
        self,
        denoiser: OpenVinoComponent,
        latents: np.ndarray,
        guidance_scale: float,
        coefficients: np.ndarray,
        prompt: Arrays,
    ) -> None:
        self.denoiser, self.coefficients = denoiser, coefficients
        self.buffers: Arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in prompt.items()}
        self.buffers["latents"] = np.array(latents, np.float32)
        self.buffers["guidance_scale"] = np.array(guidance_scale, np.float32)
        self.buffers["step"] = np.zeros((), np.int64)
        self.buffers["coefficients"] = np.zeros(coefficients.shape[1], np.float32)
        for name in sorted(set(denoiser.inputs) - set(self.buffers)):  # history, noise
            self.buffers[name] = np.zeros(_extra_shape(name, denoiser, latents), np.float32)
        denoiser.check({"latents": latents, **self.buffers})
        self.state = {f"{name}_out": self.buffers[name] for name in ("latents", "history") if name in denoiser.inputs}

    def step(self, index: int, noise: np.ndarray | None) -> None:
        self.buffers["step"][...] = index
        self.buffers["coefficients"][...] = self.coefficients[index]
        if noise is not None:
            self.buffers["noise"][...] = noise
        self.denoiser.infer_in_place(self.buffers, self.state)

    def latents(self) -> np.ndarray:
        return np.array(self.buffers["latents"])

    def replace(self, latents: np.ndarray) -> None:
        self.buffers["latents"][...] = latents

    def close(self) -> None:
        pass


def _extra_shape(name: str, denoiser: OpenVinoComponent, latents: np.ndarray) -> tuple[int, ...]:
    if name == "noise":
        return latents.shape
    history = denoiser.inputs[name][1]
    assert history is not None
    return (latents.shape[0], history, *latents.shape[1:])


def _tensor(buffer: np.ndarray) -> Any:
    """An OpenVINO tensor over the buffer's own memory."""
    ov = _openvino()

    return ov.Tensor(buffer, shared_memory=True)
