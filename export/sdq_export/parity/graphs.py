"""Running canonical graphs through ONNX Runtime: the denoiser's bare output, its whole step, its inner tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.backends.onnxruntime import open_session
from sdq_engines.lowering.save import save_graph
from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_export.conditioning import Conditioning
from sdq_export.sampler.plan import SamplerPlan, StepMap
from sdq_export.scratch import temporary_folder

__all__ = ["GraphRunner", "identity_row", "open_graph", "step_feeds"]

Arrays = dict[str, NDArray[Any]]

_FOLDED_BYTES = 2 << 30
"""Beside the torch reference there is no room for a second copy of a larger denoiser's weights in FP32."""


def open_graph(model: ir.Model, folder: Path) -> Any:
    """Open a graph in ONNX Runtime through files in ``folder``, with as many threads as torch uses."""
    numbers = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    folds = numbers * 4 <= _FOLDED_BYTES
    return open_session(save_graph(model, folder), threads=torch.get_num_threads(), fold_constants=folds)


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
    """

    def __init__(
        self,
        denoiser: ir.Model,
        prologue: ir.Model,
        plan: SamplerPlan,
        conditioning: Conditioning,
        extra: Tensor | None = None,
    ) -> None:
        self.plan = plan
        # graphs of several gigabytes do not fit into protobuf's memory; from a file they do
        with temporary_folder() as folder:
            self.session = open_graph(denoiser, Path(folder) / "denoiser")
            prologue_session = open_graph(prologue, Path(folder) / "prologue")
        names = [output.name for output in prologue_session.get_outputs()]
        self.inputs = {item.name for item in self.session.get_inputs()}
        wanted = {item.name for item in prologue_session.get_inputs()}
        given = {name: array for name, array in conditioning.numpy().items() if name in wanted}
        self.prompt: Arrays = dict(zip(names, prologue_session.run(names, given), strict=True))
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
