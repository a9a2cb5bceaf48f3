"""Running canonical graphs through ONNX Runtime: the denoiser's bare output, its whole step, its inner tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.backends.onnxruntime import Provider, open_session
from sdq_engines.lowering.save import save_graph
from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_export.conditioning import Conditioning
from sdq_export.passes.bypass import BypassActivations
from sdq_export.sampler.plan import SamplerPlan, StepMap
from sdq_export.scratch import temporary_folder

__all__ = ["GraphFile", "GraphRunner", "identity_row", "open_graph", "stage_graph", "step_feeds", "without_activations"]

Arrays = dict[str, NDArray[Any]]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_FOLDED_BYTES = 2 << 30
"""A larger graph's weights stay as they are stored: in FP32 they would be one more copy of a large network."""


@dataclass(frozen=True)
class GraphFile:
    """A graph on disk: what an engine opens by itself, without its weights in this process's memory."""

    path: Path
    numbers: int
    """Elements of all constants, whatever they are stored as."""


def stage_graph(model: ir.Model, folder: Path) -> GraphFile:
    """Write a graph, and its weights beside it where they are large, into a folder."""
    numbers = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    return GraphFile(save_graph(model, folder), numbers)


def without_activations(graph: GraphFile, folder: Path) -> GraphFile:
    """A denoiser's graph with activation quantization bypassed, written into another folder."""
    model = ir.load(graph.path)
    BypassActivations()(model)
    return stage_graph(model, folder)


def open_graph(graph: GraphFile | ir.Model, folder: Path | None = None, device: str = "cpu") -> Any:
    """Open a graph in ONNX Runtime, with as many threads as torch uses; one in memory through files in ``folder``.

    On "cuda" it runs there, if this ONNX Runtime can: in full FP32, as on the CPU.
    """
    if isinstance(graph, ir.Model):
        assert folder is not None
        graph = stage_graph(graph, folder)
    return open_session(
        graph.path,
        _providers(device),
        threads=torch.get_num_threads(),
        lean=graph.numbers * 4 > _FOLDED_BYTES,
    )


def _providers(device: str) -> list[Provider]:
    import onnxruntime as ort

    if device != "cuda" or _CUDA not in ort.get_available_providers():
        return [_CPU]
    return [(_CUDA, {"use_tf32": "0"}), _CPU]


def identity_row(slots: int) -> NDArray[np.float32]:
    """Coefficients that make ``latents_out`` the guided output itself, and the model's input ``latents``."""
    first = np.eye(1, slots, dtype=np.float32)[0]
    return StepMap(np.zeros((slots, slots), np.float32), first, np.zeros(slots, np.float32), first).pack()


def step_feeds(
    plan: SamplerPlan,
    latents: NDArray[np.float32],
    step: int,
    guidance_scale: float,
    row: NDArray[np.float32],
    history: NDArray[np.float32] | None = None,
    noise: NDArray[np.float32] | None = None,
) -> Arrays:
    """Inputs of the whole-step graph but for the prologue's; history and noise default to zeros."""
    count, *shape = latents.shape
    feeds: Arrays = {
        "latents": latents,
        "guidance_scale": np.asarray(guidance_scale, np.float32),
        "step": np.asarray(step, np.int64),
        "coefficients": row,
    }
    if plan.history:
        feeds["history"] = np.zeros((count, plan.history, *shape), np.float32) if history is None else history
    if plan.stochastic:
        feeds["noise"] = np.zeros_like(latents) if noise is None else noise
    return feeds


class GraphRunner:
    """A denoiser's two graphs, opened in ONNX Runtime, for one batch of prompts.

    Args:
        denoiser: the whole step.
        prologue: what depends on the prompts alone.
        plan: the sampler that the step belongs to.
        conditioning: of 2N prompts, unconditional first.
        extra: float32 [N, 1 + C, h, w], of an inpainting denoiser.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        denoiser: GraphFile | ir.Model,
        prologue: GraphFile | ir.Model,
        plan: SamplerPlan,
        conditioning: Conditioning,
        extra: Tensor | None = None,
        device: str = "cpu",
    ) -> None:
        self.plan = plan
        with temporary_folder() as folder:
            self.prompt = _prompt(open_graph(prologue, Path(folder) / "prologue", device), conditioning)
            self.session = open_graph(denoiser, Path(folder) / "denoiser", device)
        self.inputs = {item.name for item in self.session.get_inputs()}
        if extra is not None:
            self.prompt[EXTRA_CHANNELS] = extra.numpy()

    def output(self, model_inputs: Tensor, step: int, guidance_scale: float) -> NDArray[np.float32]:
        """The guided output [N, C, h, w] at a step."""
        feeds = step_feeds(self.plan, model_inputs.numpy(), step, guidance_scale, identity_row(self.plan.slots))
        result: NDArray[np.float32] = self.run(feeds, ["latents_out"])["latents_out"]
        return result

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        """Run the denoiser with its own inputs and this batch's prompts."""
        names = list(outputs or (output.name for output in self.session.get_outputs()))
        given = {name: value for name, value in {**feeds, **self.prompt}.items() if name in self.inputs}
        return dict(zip(names, self.session.run(names, given), strict=True))


def _prompt(prologue: Any, conditioning: Conditioning) -> Arrays:
    """What the prologue makes of the prompts; its session ends with this call."""
    names = [output.name for output in prologue.get_outputs()]
    wanted = {item.name for item in prologue.get_inputs()}
    given = {name: array for name, array in conditioning.numpy().items() if name in wanted}
    return dict(zip(names, prologue.run(names, given), strict=True))
