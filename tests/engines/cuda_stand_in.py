"""Host memory and ONNX Runtime in the place of a GPU's runtime and of TensorRT's, where there is no GPU.

It stands in for NVIDIA's libraries alone, as our code calls them, so that the session's own logic (shapes, buffers,
tables, the captured graph, state feeding back) runs on any machine. What only a GPU can show is in test_gpu.py.
"""

from __future__ import annotations

import ctypes
import enum
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdq_engines.backends.onnxruntime import OnnxRuntimeComponent, open_session


class _Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Runtime(types.ModuleType):
    """cuda.bindings.runtime over host memory; what is enqueued during a capture is recorded and not run."""

    cudaError_t = _Error
    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return _Error.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        del self.memory[pointer]
        return (_Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:
        self.enqueue(lambda: ctypes.memmove(target, source, size) and None)
        return (_Error.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        return _Error.cudaSuccess, 1

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return (_Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.recording = []
        return (_Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        recorded, self.recording = self.recording, None
        return _Error.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        return _Error.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph: object) -> tuple[Any, ...]:
        return (_Error.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> tuple[Any, ...]:
        self.launches += 1
        for work in graph:
            work()
        return (_Error.cudaSuccess,)


@dataclass
class Engine:
    """An ICudaEngine and its IExecutionContext over an ONNX graph."""

    runtime: Runtime
    model: bytes
    profile: dict[str, tuple[tuple[int, ...], ...]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self) -> None:
        session = open_session(self.model)
        self.component = OnnxRuntimeComponent(session, "cpu")
        self.tensors = [*session.get_inputs(), *session.get_outputs()]
        self.input_count = len(session.get_inputs())

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(self.tensors[index].name)

    def _index(self, name: str) -> int:
        return [tensor.name for tensor in self.tensors].index(name)

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if self._index(name) < self.input_count else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.tensors[self._index(name)].type)

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        return self.profile[name]

    def create_execution_context(self) -> Engine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an input as it was set; of an output with the batch of `latents`. Before that, as the graph states it."""
        if name in self.shapes:
            return self.shapes[name]
        stated = self.tensors[self._index(name)].shape
        first = next(iter(self.shapes.values()))[0] if self.shapes else -1
        return tuple(first if isinstance(dim, str) else dim for dim in stated)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.runtime.enqueue(self._run)
        return True

    def _run(self) -> None:
        self.runs += 1
        inputs = {tensor.name: self._view(tensor.name) for tensor in self.tensors[: self.input_count]}
        for name, value in self.component.run({name: np.array(view) for name, view in inputs.items()}).items():
            self._view(name)[...] = value

    def _view(self, name: str) -> np.ndarray:
        dtype, shape = nptype(self.get_tensor_dtype(name)), self.get_tensor_shape(name)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


def nptype(name: str) -> type:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[name]


#: As much of the module `tensorrt` as a loaded plan needs.
TRT = types.SimpleNamespace(nptype=nptype, TensorIOMode=types.SimpleNamespace(INPUT="INPUT"))
