"""A built OpenVINO engine, opened: its compiled graphs, and a run of the denoiser on buffers of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.backends.base import Arrays
from sdq_engines.backends.openvino.library import DEVICE, PROPERTIES, openvino
from sdq_engines.errors import SdqError
from sdq_engines.package.held import hold
from sdq_engines.package.layout import DENOISER

if TYPE_CHECKING:
    from sdq_engines.package.schema import EngineEntry
    from sdq_engines.package.store import Package

__all__ = ["OpenVinoComponent", "OpenVinoSession", "OpenVinoStepper"]


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
        ov = openvino()

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
        ov = openvino()

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
    ov = openvino()

    return ov.Tensor(buffer, shared_memory=True)
