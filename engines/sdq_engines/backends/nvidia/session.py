"""Plans in GPU memory: one execution context per component, latents on the device, one CUDA graph per step.

One stream, and one lock over it: a component's call or a whole run has the device to itself, other threads wait. Calls
would not overlap on a GPU that one of them fills; and buffers and captured graphs are one set for all threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.backends.base import Arrays
from sdq_engines.backends.nvidia.cuda import Buffer, Graph, Stream
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_bytes
from sdq_engines.package.held import hold
from sdq_engines.package.layout import DENOISER
from sdq_engines.places import cache_folder

if TYPE_CHECKING:
    from sdq_engines.backends.nvidia.library import Library
    from sdq_engines.package.schema import EngineEntry
    from sdq_engines.package.store import Package

__all__ = ["Device", "NvidiaComponent", "NvidiaSession", "NvidiaStepper"]


class NvidiaSession:
    """The package's plans, each deserialized on first use. Deserializing runs code from the plan: see SECURITY.md."""

    def __init__(self, library: Library, trt: Any, package: Package, entry: EngineEntry) -> None:
        self.name, self.library, self.trt = library.engine, library, trt
        self.package, self.entry = package, entry
        self.stream = Stream()
        self.device = Device(self.name)
        self._files = hold(package.folder, package.files_of(entry))
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        # Lean runtimes embedded in a plan would be loaded and run; ours never have one.
        self._runtime.engine_host_code_allowed = False
        self._components: dict[str, NvidiaComponent] = {}

    def component(self, name: str) -> NvidiaComponent:
        with self.device.call():
            if name not in self._components:
                self._components[name] = self._open(name)
            return self._components[name]

    def _open(self, name: str) -> NvidiaComponent:
        relative = self.entry.components[name]
        engine = self._runtime.deserialize_cuda_engine(self._files[relative].read())
        if engine is None:
            raise SdqError(
                f"{self.name} refuses its own plan of {name}.",
                f"Build it here: sdq-deploy build {self.package.folder} --engine {self.name}",
            )
        cache = _JitCache(self.package.manifest.files[relative].sha256) if self.library.rtx else None
        return NvidiaComponent(self.trt, engine, self.stream, name, cache, self.device)

    def stepper(
        self, latents: np.ndarray, guidance_scale: float, coefficients: np.ndarray, prompt: Arrays
    ) -> NvidiaStepper:
        return NvidiaStepper(self.component(DENOISER), latents, guidance_scale, coefficients, prompt)


class Device:
    """Who may use the stream: one thread at a time, and of one thread one run at a time.

    Args:
        engine: for messages.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._lock = threading.RLock()
        self._running = False

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call of a component; a run's own thread may make it between the run's steps, for a preview."""
        with self._lock:
            yield

    def begin_run(self) -> None:
        """Wait for the device, and keep it until `end_run`.

        Raises:
            SdqError: this thread is in the middle of a run.
        """
        self._lock.acquire()
        if self._running:
            self._lock.release()
            raise SdqError(
                f"A callback of a run on {self.engine} asked for another run, which would overwrite the first's state.",
                "Start it after the run, or load the package a second time.",
            )
        self._running = True

    def end_run(self) -> None:
        """Let the next one have the device."""
        self._running = False
        self._lock.release()


class _JitCache:
    """TensorRT-RTX compiles kernels for the GPU at first use; what it compiled is kept beside the verified hashes."""

    def __init__(self, plan_sha256: str) -> None:
        key = hashlib.sha256(plan_sha256.encode()).hexdigest()[:32]
        self.path: Path = cache_folder() / "tensorrt-rtx" / f"{key}.cache"
        self.cache: Any = None

    def attach(self, config: Any) -> None:
        self.cache = config.create_runtime_cache()
        if self.path.is_file():
            self.cache.deserialize(self.path.read_bytes())
        config.set_runtime_cache(self.cache)

    def save(self) -> None:
        with contextlib.suppress(OSError):  # the next start compiles again
            atomic_write_bytes(self.path, bytes(self.cache.serialize()))


class NvidiaComponent:
    """One plan and its context; buffers are made per batch size and kept for the last one."""

    def __init__(
        self, trt: Any, engine: Any, stream: Stream, name: str, cache: _JitCache | None, device: Device
    ) -> None:
        self.trt, self.engine, self.stream, self.name, self.device = trt, engine, stream, name, device
        self._cache, self._saved = cache, cache is None
        self.graph: Graph | None = None
        """A step captured for the buffers as they are."""
        self.context = self._context()
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {t: engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT for t in tensors}
        self.inputs = {t: _known(engine.get_tensor_shape(t)) for t in tensors if is_input[t]}
        self.outputs = [t for t in tensors if not is_input[t]]
        self.buffers: dict[str, Buffer] = {}

    def _context(self) -> Any:
        if self._cache is None:
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        # Kernels for the given shapes are compiled before they run, not behind our back during a capture.
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED  # the stepper captures its own
        self._cache.attach(config)
        return self.engine.create_execution_context(config)

    def dtype(self, tensor: str) -> np.dtype[Any]:
        return np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(tensor)))

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the inputs' shapes, make buffers for all tensors and point the context at them.

        Raises:
            SdqError: a shape outside the profile that the engine was built for.
        """
        for tensor in self.inputs:
            low, _, high = self.engine.get_tensor_profile_shape(tensor, 0)
            shape = shapes[tensor]
            if len(low) != len(shape) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                raise SdqError(
                    f"The {self.name} engine was built for {tensor} of shape {tuple(low)} to {tuple(high)}; "
                    f"{tuple(shape)} was asked for.",
                    "Ask for fewer images at once, or build with a larger --batch-max or --size.",
                )
            self.context.set_input_shape(tensor, shape)
        for tensor in (*self.inputs, *self.outputs):
            shape = tuple(self.context.get_tensor_shape(tensor))
            if tensor not in self.buffers or self.buffers[tensor].shape != shape:
                self.graph = None  # it reads the buffer that goes
                self.buffers[tensor] = Buffer(shape, self.dtype(tensor))
            self.context.set_tensor_address(tensor, self.buffers[tensor].pointer)

    def enqueue(self) -> None:
        """Run once on the stream with what the buffers hold."""
        if not self.context.execute_async_v3(int(self.stream.handle)):
            raise SdqError(f"The {self.name} engine failed to run.", "See the messages above; sdq-deploy doctor")

    def keep_compiled(self) -> None:
        """After a first run: write what TensorRT-RTX compiled to the cache."""
        if not self._saved and self._cache is not None:
            self._cache.save()
            self._saved = True

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        with self.device.call():
            self.bind({name: feeds[name].shape for name in self.inputs})
            for name in self.inputs:
                self.buffers[name].upload(feeds[name], self.stream)
            self.enqueue()
            results = {name: self.buffers[name].download(self.stream) for name in self.outputs}
            self.keep_compiled()
            return results


def _known(shape: Any) -> tuple[int | None, ...]:
    return tuple(int(length) if length >= 0 else None for length in shape)


class NvidiaStepper:
    """A run on the device: a step runs the denoiser and feeds the state back, as one captured graph.

    One CUDA graph serves every step, since what changes between steps (the step index, the coefficient row, noise) is
    read from fixed buffers that are filled just before the launch.
    """

    def __init__(
        self,
        denoiser: NvidiaComponent,
        latents: np.ndarray,
        guidance_scale: float,
        coefficients: np.ndarray,
        prompt: Arrays,
    ) -> None:
        self.denoiser, self.stream = denoiser, denoiser.stream
        denoiser.device.begin_run()
        self._open = True
        try:
            self._start(latents, guidance_scale, coefficients, prompt)
        except BaseException:
            self.close()
            raise

    def _start(self, latents: np.ndarray, guidance_scale: float, coefficients: np.ndarray, prompt: Arrays) -> None:
        denoiser = self.denoiser
        feeds: Arrays = {
            **prompt,
            "latents": latents,
            "guidance_scale": np.asarray(guidance_scale),
            "step": np.zeros(()),
            "coefficients": coefficients[0],
            "noise": np.zeros_like(latents),
        }
        if "history" in denoiser.inputs:
            slots = denoiser.inputs["history"][1]
            assert slots is not None
            feeds["history"] = np.zeros((latents.shape[0], slots, *latents.shape[1:]))
        denoiser.bind({name: feeds[name].shape for name in denoiser.inputs})
        self.state = [name for name in ("latents", "history") if name in denoiser.inputs]
        for name in denoiser.inputs:
            denoiser.buffers[name].upload(feeds[name], self.stream)
        if denoiser.graph is None:
            self._capture()
            for name in self.state:
                denoiser.buffers[name].upload(feeds[name], self.stream)
        self._rows = self._table(coefficients.astype(np.float32))
        self._steps = self._table(np.arange(len(coefficients), dtype=denoiser.dtype("step")))

    def _table(self, array: np.ndarray) -> Buffer:
        buffer = Buffer(array.shape, array.dtype)
        buffer.upload(array, self.stream)
        return buffer

    def _enqueue(self) -> None:
        self.denoiser.enqueue()
        for name in self.state:
            self.denoiser.buffers[name].copy_from(self.denoiser.buffers[f"{name}_out"], self.stream)

    def _capture(self) -> None:
        """Run once uncaptured, as TensorRT asks (it may allocate and compile), which changes the state; then capture.

        The graph is kept with the buffers that it reads, for every run of these shapes.
        """
        self._enqueue()
        self.stream.synchronize()
        self.denoiser.keep_compiled()
        capturable = getattr(self.denoiser.context, "is_stream_capturable", None)
        if capturable is None or capturable(int(self.stream.handle)):
            self.denoiser.graph = self.stream.capture(self._enqueue)

    def step(self, index: int, noise: np.ndarray | None) -> None:
        buffers = self.denoiser.buffers
        buffers["step"].copy_from(self._steps, self.stream, index * buffers["step"].nbytes)
        buffers["coefficients"].copy_from(self._rows, self.stream, index * buffers["coefficients"].nbytes)
        if noise is not None:
            buffers["noise"].upload(noise, self.stream)
        if self.denoiser.graph is None:
            self._enqueue()
        else:
            self.denoiser.graph.launch()

    def latents(self) -> np.ndarray:
        return self.denoiser.buffers["latents"].download(self.stream)

    def replace(self, latents: np.ndarray) -> None:
        self.denoiser.buffers["latents"].upload(latents, self.stream)

    def close(self) -> None:
        if self._open:
            self._open = False
            self.denoiser.device.end_run()
