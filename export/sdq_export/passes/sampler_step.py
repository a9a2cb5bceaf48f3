"""The whole step: guidance and the sampler's update around the denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_export.graph import NodeList, add_input, constant
from sdq_export.passes.time_tables import STEP_INPUT
from sdq_export.sampler.plan import row_length

__all__ = ["LatentShape", "SamplerStep"]

LatentShape = tuple[int, int | str, int | str]

_FLOAT = ir.DataType.FLOAT


class SamplerStep(ir.passes.InPlacePass):
    """Wrap the denoiser into one sampler step whose coefficients are an input.

    With the state's S = 1 + H slots (the latents and H history slots), all in FP32:

        model_input = u . state
        uncond, cond = denoiser(model_input twice)
        guided       = uncond + guidance_scale * (cond - uncond)
        new_state    = M state + N guided (+ C noise)

    The products are elementwise, not MatMul, so that no engine computes them in TF32 or FP16.

    Requires: the graph's first input is the denoiser's sample, its only output the prediction, and ``step`` an input.
    Ensures: inputs ``latents, history, noise, guidance_scale, step, coefficients, extra_channels`` (without history
    where H is 0, without noise where the sampler adds none, without extra channels but for inpainting), then the others
    in their order; outputs ``latents_out, history_out``.

    Args:
        history: H.
        stochastic: whether steps take fresh noise.
        latent_shape: C, h, w; the last two are names where the size is left free.
        extra_channels: what an inpainting denoiser takes beside the latents, as one more input of the graph.
    """

    def __init__(self, history: int, stochastic: bool, latent_shape: LatentShape, extra_channels: int = 0) -> None:
        super().__init__()
        self.history = history
        self.slots = 1 + history
        self.stochastic = stochastic
        self.latent_shape = latent_shape
        self.extra_channels = extra_channels

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Wrap in place."""
        graph = model.graph
        sample, prediction = graph.inputs[0], graph.outputs[0]
        others = [value for value in graph.inputs[1:] if value.name != STEP_INPUT]
        step = next(value for value in graph.inputs if value.name == STEP_INPUT)
        first = next(iter(graph))
        graph.inputs.clear()
        inputs = self._add_inputs(graph, step)
        graph.inputs.extend(others)

        before, after = NodeList(), NodeList()
        coefficients = self._coefficients(graph, before, inputs.coefficients)
        state = self._state(graph, before, inputs)
        model_input = self._model_input(graph, before, state, inputs.extra, coefficients)
        graph.insert_before(first, before.nodes)
        ir.convenience.replace_all_uses_with(sample, model_input)

        prediction.name = "sampler/prediction"
        guided = self._guide(graph, after, prediction, inputs.guidance_scale)
        graph.outputs.clear()
        graph.outputs.extend(self._update(graph, after, state, guided, inputs.noise, coefficients))
        graph.extend(after.nodes)
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """The graph is a denoiser."""
        shapes = [
            [dim if isinstance(dim, int) else str(dim.value) for dim in (value.shape or [])][1:]
            for value in (model.graph.inputs[0], model.graph.outputs[0])
        ]
        channels, *size = self.latent_shape
        wanted = [[channels + self.extra_channels, *size], [channels, *size]]
        if len(model.graph.outputs) != 1 or shapes != wanted:
            raise ir.passes.PreconditionError(f"sample and prediction are {shapes}, {wanted} is wanted")
        if not any(value.name == STEP_INPUT for value in model.graph.inputs):
            raise ir.passes.PreconditionError(f"the graph has no input {STEP_INPUT}")

    def ensures(self, model: ir.Model) -> None:
        """The step's outputs are there."""
        wanted = ["latents_out", "history_out"][: 1 + (self.history > 0)]
        if [value.name for value in model.graph.outputs] != wanted:
            raise ir.passes.PostconditionError(f"the outputs are {model.graph.outputs}, {wanted} are wanted")

    def _add_inputs(self, graph: ir.Graph, step: ir.Value) -> _Inputs:
        latents = add_input(graph, "latents", _FLOAT, ["batch", *self.latent_shape])
        history = (
            add_input(graph, "history", _FLOAT, ["batch", self.history, *self.latent_shape]) if self.history else None
        )
        noise = add_input(graph, "noise", _FLOAT, ["batch", *self.latent_shape]) if self.stochastic else None
        guidance_scale = add_input(graph, "guidance_scale", _FLOAT, [])
        graph.inputs.append(step)
        coefficients = add_input(graph, "coefficients", _FLOAT, [row_length(self.slots)])
        extra = None
        if self.extra_channels:
            extra = add_input(graph, EXTRA_CHANNELS, _FLOAT, ["batch", self.extra_channels, *self.latent_shape[1:]])
        return _Inputs(latents, history, noise, guidance_scale, coefficients, extra)

    def _coefficients(self, graph: ir.Graph, new: NodeList, row: ir.Value) -> _Coefficients:
        """Split the row into M [S, S, 1, 1, 1] and N, C, u [S, 1, 1, 1], ready to multiply states [b, S, C, h, w]."""
        slots = self.slots
        sizes = constant(graph, "sampler.sizes", np.array([slots * slots, slots, slots, slots], np.int64))
        names = [f"sampler/{name}_row" for name in ("M", "N", "C", "u")]
        parts = new.split(row, names, [[slots * slots], [slots], [slots], [slots]], sizes)
        square = constant(graph, "sampler.square", np.array([slots, slots, 1, 1, 1], np.int64))
        vector = constant(graph, "sampler.vector", np.array([slots, 1, 1, 1], np.int64))
        matrix = new.add("Reshape", [parts[0], square], "sampler/M", shape=[slots, slots, 1, 1, 1])
        output, noise, u = (
            new.add("Reshape", [part, vector], f"sampler/{name}", shape=[slots, 1, 1, 1])
            for name, part in zip(("N", "C", "u"), parts[1:], strict=True)
        )
        return _Coefficients(matrix, output, noise, u)

    def _state(self, graph: ir.Graph, new: NodeList, inputs: _Inputs) -> ir.Value:
        """Latents and history as one tensor [batch, S, C, h, w]."""
        axis = constant(graph, "sampler.axis_1", np.array([1], np.int64))
        latents = new.add(
            "Unsqueeze", [inputs.latents, axis], "sampler/latents_slot", shape=["batch", 1, *self.latent_shape]
        )
        if inputs.history is None:
            return latents
        return new.add(
            "Concat",
            [latents, inputs.history],
            "sampler/state",
            shape=["batch", self.slots, *self.latent_shape],
            attributes={"axis": 1},
        )

    def _model_input(
        self, graph: ir.Graph, new: NodeList, state: ir.Value, extra: ir.Value | None, coefficients: _Coefficients
    ) -> ir.Value:
        """u . state and the extra channels, once for the unconditional half and once for the conditional one."""
        product = new.add("Mul", [state, coefficients.u], "sampler/u_state")
        single = self._sum_slots(graph, new, product, "sampler/model_input", 1)
        channels, *size = self.latent_shape
        if extra is not None:
            channels += self.extra_channels
            single = new.add(
                "Concat",
                [single, extra],
                "sampler/model_input_extra",
                shape=["batch", channels, *size],
                attributes={"axis": 1},
            )
        return new.add(
            "Concat",
            [single, single],
            "sampler/model_input_twice",
            shape=["2*batch", channels, *size],
            attributes={"axis": 0},
        )

    def _guide(self, graph: ir.Graph, new: NodeList, prediction: ir.Value, guidance_scale: ir.Value) -> ir.Value:
        """uncond + guidance_scale * (cond - uncond), [batch, 1, C, h, w]."""
        half: list[int | str] = ["batch", *self.latent_shape]
        uncond, cond = new.split(prediction, ["sampler/uncond", "sampler/cond"], [half, half])
        difference = new.add("Sub", [cond, uncond], "sampler/cond_minus_uncond")
        scaled = new.add("Mul", [difference, guidance_scale], "sampler/guidance")
        guided = new.add("Add", [uncond, scaled], "sampler/guided")
        axis = constant(graph, "sampler.axis_1", np.array([1], np.int64))
        return new.add("Unsqueeze", [guided, axis], "sampler/guided_slot", shape=["batch", 1, *self.latent_shape])

    def _update(
        self,
        graph: ir.Graph,
        new: NodeList,
        state: ir.Value,
        guided: ir.Value,
        noise: ir.Value | None,
        coefficients: _Coefficients,
    ) -> list[ir.Value]:
        """M state + N guided (+ C noise), taken apart into latents and history."""
        shape: list[int | str] = ["batch", self.slots, *self.latent_shape]
        axis_1 = constant(graph, "sampler.axis_1", np.array([1], np.int64))
        rows = new.add("Unsqueeze", [state, axis_1], "sampler/state_rows", shape=["batch", 1, *shape[1:]])
        products = new.add(
            "Mul", [rows, coefficients.matrix], "sampler/M_state", shape=["batch", self.slots, *shape[1:]]
        )
        kept = self._sum_slots(graph, new, products, "sampler/kept", 2)
        moved = new.add("Mul", [guided, coefficients.output], "sampler/N_guided", shape=shape)
        result = new.add("Add", [kept, moved], "sampler/new_state", shape=shape)
        if noise is not None:
            slot = new.add("Unsqueeze", [noise, axis_1], "sampler/noise_slot", shape=["batch", 1, *self.latent_shape])
            fresh = new.add("Mul", [slot, coefficients.noise], "sampler/C_noise", shape=shape)
            result = new.add("Add", [result, fresh], "sampler/noised_state", shape=shape)
        first = constant(graph, "sampler.slot_0", np.zeros((), np.int64))
        latents = new.add(
            "Gather", [result, first], "latents_out", shape=["batch", *self.latent_shape], attributes={"axis": 1}
        )
        if not self.history:
            return [latents]
        bounds = [constant(graph, f"sampler.{name}", np.array([at], np.int64)) for name, at in
                  (("slot_from", 1), ("slot_to", self.slots))]  # fmt: skip
        history = new.add(
            "Slice",
            [result, *bounds, axis_1],
            "history_out",
            shape=["batch", self.history, *self.latent_shape],
        )
        return [latents, history]

    def _sum_slots(self, graph: ir.Graph, new: NodeList, value: ir.Value, name: str, axis: int) -> ir.Value:
        """Sum over the slots on ``axis``; a single slot is only taken out."""
        axes = constant(graph, f"sampler.axis_{axis}", np.array([axis], np.int64))
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else str(dim) for at, dim in enumerate(value.shape) if at != axis]
        if self.slots == 1:
            return new.add("Squeeze", [value, axes], name, shape=shape)
        return new.add("ReduceSum", [value, axes], name, shape=shape, attributes={"keepdims": 0})


@dataclass(frozen=True)
class _Inputs:
    latents: ir.Value
    history: ir.Value | None
    noise: ir.Value | None
    guidance_scale: ir.Value
    coefficients: ir.Value
    extra: ir.Value | None


@dataclass(frozen=True)
class _Coefficients:
    matrix: ir.Value
    output: ir.Value
    noise: ir.Value
    u: ir.Value
