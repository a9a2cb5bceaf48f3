"""The little of CUDA that an engine needs, by cuda-python: memory, copies, one stream, captured graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdq_engines.errors import SdqError

__all__ = ["Buffer", "Gpu", "Graph", "Stream", "find_gpu"]


@dataclass(frozen=True)
class Gpu:
    """The current GPU."""

    name: str
    architecture: str
    """e.g. "sm_89"."""


def find_gpu() -> tuple[Gpu | None, str]:
    """The current GPU, or None and the reason."""
    try:
        if importlib.util.find_spec("cuda.bindings") is None:
            return None, "cuda-python is not installed"
        from cuda.bindings import runtime as cudart
    except ImportError:
        return None, "cuda-python is not installed"
    try:
        error, count = cudart.cudaGetDeviceCount()
    except (OSError, RuntimeError) as failure:
        return None, f"the CUDA runtime does not load: {failure}"
    if error != cudart.cudaError_t.cudaSuccess or not count:
        return None, f"no NVIDIA GPU with a driver was found ({error.name})"
    error, device = cudart.cudaGetDevice()
    _, found = cudart.cudaGetDeviceProperties(device)
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return Gpu(name.rstrip("\0"), f"sm_{found.major}{found.minor}"), ""


def _call(function: str, *arguments: Any) -> Any:
    """Call a CUDA runtime function; returns its value, its values, or None.

    Raises:
        SdqError: CUDA reports an error.
    """
    from cuda.bindings import runtime as cudart

    error, *values = getattr(cudart, function)(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(error)
        hint = (
            "Use a smaller batch, or free GPU memory." if error == cudart.cudaError_t.cudaErrorMemoryAllocation else ""
        )
        raise SdqError(f"CUDA: {text.decode() if isinstance(text, bytes) else text} ({function}).", hint)
    return values[0] if len(values) == 1 else (values or None)


def _kind(name: str) -> Any:
    from cuda.bindings import runtime as cudart

    return getattr(cudart.cudaMemcpyKind, name)


class Stream:
    """A CUDA stream."""

    def __init__(self) -> None:
        self.handle = _call("cudaStreamCreate")

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        _call("cudaStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what `enqueue` puts on this stream, without running it."""
        from cuda.bindings import runtime as cudart

        _call("cudaStreamBeginCapture", self.handle, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        finally:
            graph = _call("cudaStreamEndCapture", self.handle)
        return Graph(graph, self)


class Graph:
    """A captured step, ready to launch."""

    def __init__(self, graph: Any, stream: Stream) -> None:
        self.stream = stream
        self._executable = _call("cudaGraphInstantiate", graph, 0)
        _call("cudaGraphDestroy", graph)

    def launch(self) -> None:
        """Enqueue the whole graph."""
        _call("cudaGraphLaunch", self._executable, self.stream.handle)

    def __del__(self) -> None:
        if getattr(self, "_executable", None) is not None:
            _quietly("cudaGraphExecDestroy", self._executable)


class Buffer:
    """Device memory of a fixed shape and type, freed with the object."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.pointer = int(_call("cudaMalloc", max(self.nbytes, 1)))

    def upload(self, array: np.ndarray, stream: Stream) -> None:
        """Copy from the host, cast to the buffer's type; waits, so `array` may go at once."""
        host = np.asarray(array, self.dtype, order="C")  # ascontiguousarray would make scalars one-dimensional
        if host.shape != self.shape:
            raise ValueError(f"shape {host.shape} given, {self.shape} wanted")
        _call(
            "cudaMemcpyAsync",
            self.pointer,
            host.ctypes.data,
            self.nbytes,
            _kind("cudaMemcpyHostToDevice"),
            stream.handle,
        )
        stream.synchronize()

    def copy_from(self, source: Buffer, stream: Stream, offset: int = 0) -> None:
        """Enqueue a copy from another buffer on the device, starting `offset` bytes into it."""
        kind = _kind("cudaMemcpyDeviceToDevice")
        _call("cudaMemcpyAsync", self.pointer, source.pointer + offset, self.nbytes, kind, stream.handle)

    def download(self, stream: Stream) -> np.ndarray:
        """Copy to the host and wait."""
        host = np.empty(self.shape, self.dtype)
        _call(
            "cudaMemcpyAsync",
            host.ctypes.data,
            self.pointer,
            self.nbytes,
            _kind("cudaMemcpyDeviceToHost"),
            stream.handle,
        )
        stream.synchronize()
        return host

    def __del__(self) -> None:
        if getattr(self, "pointer", 0):
            _quietly("cudaFree", self.pointer)


def _quietly(function: str, handle: Any) -> None:
    """Free something at exit, when CUDA itself may be gone."""
    try:
        from cuda.bindings import runtime as cudart

        getattr(cudart, function)(handle)
    except (ImportError, TypeError, AttributeError):
        pass
