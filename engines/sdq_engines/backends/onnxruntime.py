"""ONNX Runtime: the reference engine on the CPU, and the host of NVIDIA's CUDA and TensorRT providers.

It loads the canonical graphs as they are, so its "build" adds no file: it opens every graph once, as a proof. On the
CPU, Q/DQ fusion is off (`session.disable_quant_qdq`): weights are dequantized once at load and the arithmetic is FP32
over quantized values, which is the reference's own and faster than ONNX Runtime's Q/DQ kernels, since a convolution
without a quantized output has none (docs/benchmarks.md). Unsigned activations, which its integer MatMul wants, were
tried and gain nothing: 15.9 against 15.1 ms of CPU time a step on an embedded model, and only the Linear layers take
them. With a GPU provider fusion stays on, and weight-only MatMuls run at accuracy level 1, not 4.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.backends.base import Arrays, Availability, BuildJob, BuildResult, require_working, threads_of
from sdq_engines.backends.stepping import HostStepper
from sdq_engines.errors import SdqError
from sdq_engines.package.held import PackageChangedError, hold
from sdq_engines.package.layout import DENOISER

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

    from sdq_engines.package.schema import EngineEntry, KernelCounts
    from sdq_engines.package.store import Package

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeComponent", "OnnxRuntimeSession", "make", "open_session"]

CPU = "CPUExecutionProvider"
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
Provider = str | tuple[str, dict[str, Any]]


def make(name: str) -> OnnxRuntimeBackend:
    """The backend (there is one name)."""
    return OnnxRuntimeBackend()


class OnnxRuntimeBackend:
    """See the module. Load options: `providers`, as `onnxruntime.InferenceSession` takes them, and `threads`."""

    name = "onnxruntime"
    build_options: tuple[str, ...] = ()
    load_options: tuple[str, ...] = ("providers", "threads")
    compiles = False

    def available(self) -> Availability:
        hint = "pip install 'sdq-deploy[cpu]' (or [gpu] for the CUDA provider)"
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, reason="onnxruntime is not installed", hint=hint)
        try:
            import onnxruntime as ort

            providers = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
        except (ImportError, OSError, AttributeError) as error:
            return Availability(False, reason=f"onnxruntime does not load: {error}", hint=hint)
        return Availability(True, version=ort.__version__, device=providers, builds=True)

    def lowering(self, component: str, options: Mapping[str, Any]) -> list[ir.passes.PassBase]:
        return []

    def build(self, job: BuildJob) -> BuildResult:
        import onnxruntime as ort

        components = list(job.package.manifest.components)
        for component in components:
            job.progress(component, "opening")
            open_session(job.package.component(component), [CPU])
        kernels = _kernel_counts(job.package)
        return BuildResult(dict.fromkeys(components), ort.__version__, "any CPU", {}, kernels)

    def load(self, package: Package, entry: EngineEntry, options: Mapping[str, Any]) -> OnnxRuntimeSession:
        require_working(self)
        return OnnxRuntimeSession(package, entry, _providers(options.get("providers") or [CPU]), threads_of(options))


def _providers(given: Any) -> list[Provider]:
    """The option `providers`: a row of names, or of names with settings; one name alone is taken too.

    Raises:
        SdqError: anything else.
    """
    providers = [given] if isinstance(given, str) else given
    if not isinstance(providers, list | tuple) or not all(_is_provider(each) for each in providers):
        raise SdqError(
            f"providers is {given!r}; a list of names is wanted.",
            'For example providers=["CUDAExecutionProvider", "CPUExecutionProvider"].',
        )
    return list(providers)


def _is_provider(given: Any) -> bool:
    return isinstance(given, str) or (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], dict)
    )


def open_session(
    model: Path | bytes,
    providers: Sequence[Provider] = (CPU,),
    threads: int | None = None,
    lean: bool = False,
) -> ort.InferenceSession:
    """Open a graph with the options that keep quantized arithmetic exact.

    Args:
        model: a file, or its bytes.
        providers: in order of preference.
        threads: of the CPU; None leaves it to ONNX Runtime.
        lean: take little memory, at the cost of time. Weights stay as they are stored, and each run makes FP32 of them,
            one after the other; what a run took is given back after it.

    Raises:
        SdqError: a provider that this build of ONNX Runtime lacks, or a graph that it refuses.
    """
    import onnxruntime as ort

    named = [item if isinstance(item, str) else item[0] for item in providers]
    if missing := [name for name in named if name not in ort.get_available_providers()]:
        raise SdqError(
            f"This ONNX Runtime has no {missing[0]}; it has: {', '.join(ort.get_available_providers())}.",
            "For NVIDIA's providers: pip uninstall onnxruntime, then pip install 'sdq-deploy[gpu]'",
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if named == [CPU]:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads:
        settings.intra_op_num_threads = threads
    settings.enable_cpu_mem_arena = not lean
    source = model if isinstance(model, bytes) else str(model)
    try:
        kept = ["ConstantFolding"] if lean else None
        return ort.InferenceSession(source, settings, providers=list(providers), disabled_optimizers=kept)
    except Exception as error:  # onnxruntime raises bare pybind exceptions of several kinds
        raise SdqError(f"ONNX Runtime refuses {'the graph' if isinstance(model, bytes) else model}: {error}") from error


class OnnxRuntimeComponent:
    """One graph, its inputs and outputs bound by name."""

    def __init__(self, session: ort.InferenceSession, device: str) -> None:
        self.session, self.device = session, device
        self.inputs = {item.name: _shape(item.shape) for item in session.get_inputs()}
        self.outputs = [item.name for item in session.get_outputs()]
        self.lock = threading.Lock()
        """For runs that bind device memory; a plain run of a session is safe from any thread."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        wanted = {name: value for name, value in feeds.items() if name in self.inputs}
        return dict(zip(self.outputs, self.session.run(self.outputs, wanted), strict=True))


def _shape(dims: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(dim if isinstance(dim, int) else None for dim in dims)


class OnnxRuntimeSession:
    """The package's graphs in ONNX Runtime, each opened on first use.

    ONNX Runtime's sessions are safe to run from several threads, and a run's state is the stepper's own.
    """

    name = "onnxruntime"

    def __init__(
        self, package: Package, entry: EngineEntry, providers: Sequence[Provider], threads: int | None
    ) -> None:
        self.package, self.entry = package, entry
        self.providers, self.threads = providers, threads
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        self.device = _DEVICES.get(first, "cpu")
        self._files = hold(package.folder, package.files_of(entry))
        self._components: dict[str, OnnxRuntimeComponent] = {}
        self._opening = threading.Lock()

    def component(self, name: str) -> OnnxRuntimeComponent:
        with self._opening:
            if name not in self._components:
                self._components[name] = OnnxRuntimeComponent(self._open(name), self.device)
            return self._components[name]

    def _open(self, name: str) -> ort.InferenceSession:
        """From its path, which lets ONNX Runtime map the weights; from the held file where that is no longer there."""
        relative = self.entry.components[name]
        held = {path: file for path, file in self._files.items() if path in (relative, f"{relative}.data")}
        try:
            session = open_session(self.package.path(relative), self.providers, self.threads)
        except SdqError:
            if all(file.unchanged for file in held.values()):
                raise
        else:
            if all(file.unchanged for file in held.values()):
                return session
        if len(held) > 1:  # weights beside the graph are found by its path alone
            raise PackageChangedError(self.package.folder)
        return open_session(held[relative].read(), self.providers, self.threads)

    def stepper(
        self, latents: np.ndarray, guidance_scale: float, coefficients: np.ndarray, prompt: Arrays
    ) -> HostStepper | DeviceStepper:
        denoiser = self.component(DENOISER)
        if self.device == "cpu":
            return HostStepper(denoiser, self.package.manifest, latents, guidance_scale, coefficients, prompt)
        return DeviceStepper(denoiser, self.package, latents, guidance_scale, coefficients, prompt)


class DeviceStepper:
    """A run on a GPU provider: I/O binding keeps latents, history and prompt in GPU memory between the steps."""

    def __init__(
        self,
        denoiser: OnnxRuntimeComponent,
        package: Package,
        latents: np.ndarray,
        guidance_scale: float,
        coefficients: np.ndarray,
        prompt: Arrays,
    ) -> None:
        import onnxruntime as ort

        self._value = lambda array: ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), denoiser.device, 0)
        self.session, self.device, self._lock = denoiser.session, denoiser.device, denoiser.lock
        self.rows = [np.ascontiguousarray(row) for row in coefficients]
        self.state = {"latents": self._value(latents)}
        if history := package.manifest.sampler.history:
            shape = (latents.shape[0], history, *latents.shape[1:])
            self.state["history"] = self._value(np.zeros(shape, np.float32))
        self.fixed = {name: self._value(array) for name, array in prompt.items()}
        self.fixed["guidance_scale"] = self._value(np.asarray(guidance_scale, np.float32))

    def step(self, index: int, noise: np.ndarray | None) -> None:
        binding = self.session.io_binding()
        for name, value in (*self.state.items(), *self.fixed.items()):
            binding.bind_ortvalue_input(name, value)
        binding.bind_cpu_input("step", np.asarray(index, np.int64))
        binding.bind_cpu_input("coefficients", self.rows[index])
        if noise is not None:
            binding.bind_cpu_input("noise", noise)
        for name in self.state:
            binding.bind_output(f"{name}_out", self.device, 0)
        with self._lock:
            self.session.run_with_iobinding(binding)
        self.state = dict(zip(self.state, binding.get_outputs(), strict=True))

    def latents(self) -> np.ndarray:
        return np.array(self.state["latents"].numpy())

    def replace(self, latents: np.ndarray) -> None:
        self.state["latents"] = self._value(np.asarray(latents, np.float32))

    def close(self) -> None:
        pass


def _kernel_counts(package: Package) -> KernelCounts | None:
    """Counted in the graph that ONNX Runtime's optimizer leaves for the CPU: see `kernels.onnxruntime_counts`."""
    from sdq_engines.backends.kernels import onnxruntime_counts

    return onnxruntime_counts(package)
