"""The four criteria (docs/quantization.md, "Parity")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.backends.base import Component
from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_export.checkpoint import QuantizedCheckpoint, scale_key
from sdq_export.denoiser import DenoiserGraphs
from sdq_export.parity.graphs import GraphRunner, identity_row, step_feeds
from sdq_export.parity.report import Criterion, ParityReport
from sdq_export.parity.samples import TeacherSamples, guided
from sdq_export.parity.sites import measure_sites
from sdq_export.passes.bypass import BypassActivations
from sdq_export.sampler.plan import SamplerPlan

__all__ = [
    "ENGINE_LIMIT",
    "FLOAT_LIMIT",
    "GRAPH_LIMIT",
    "INTEGER_LIMIT",
    "check_engine",
    "check_graphs",
    "compare_distances",
    "ends_and_middle",
    "float_distance",
    "quantizers_off",
]

FLOAT_LIMIT = 1e-4
"""Criterion 1, and the layers' outputs of criterion 2: relative L2."""

INTEGER_LIMIT = 1e-4
"""Criterion 2: the share of integers that may be off by one."""

GRAPH_LIMIT = 1.05
"""Criterion 3: distance(graph, teacher) / distance(fake-quantized torch, teacher)."""

ENGINE_LIMIT = 1.10
"""Criterion 4: the same for an engine."""

_FLOAT_FLOOR = 2e-3
"""Distances below this are FP16 noise, not quantization: criterion 4 of an unquantized package."""

_LEAST_CHANCE = 0.05
"""What a single step's ratio is always forgiven; see `compare_distances`."""

OnStage = Callable[[str, int, int], None]


def check_graphs(
    graphs: DenoiserGraphs,
    plan: SamplerPlan,
    samples: TeacherSamples,
    reference: Any,
    checkpoint: QuantizedCheckpoint | None,
    steps: Sequence[int] | None = None,
    on_stage: OnStage = lambda name, done, total: None,
) -> ParityReport:
    """Criteria 1 to 3, each step by step.

    Args:
        graphs: the canonical graphs.
        plan: the sampler.
        samples: the teacher's trajectory.
        reference: the torch StepDenoiser that the graphs must equal: fake-quantized, or in floating point with the
            weights as they are stored.
        checkpoint: the sites and tensors, for a quantized denoiser.
        steps: which steps to look at; all of them by default.
        on_stage: hears the criterion, and how many of its steps are done.
    """
    chosen = list(range(plan.calls)) if steps is None else list(steps)
    criteria = [_float_graph(graphs, plan, samples, reference, chosen, on_stage)]
    if checkpoint is not None:
        criteria += _sites(graphs, plan, samples, reference, checkpoint, chosen, on_stage)
        criteria.append(_quantized_graph(graphs, plan, samples, reference, chosen, on_stage))
    return ParityReport(criteria=tuple(criteria))


def check_engine(
    name: str, denoiser: Component, prompt: dict[str, NDArray[Any]], plan: SamplerPlan, samples: TeacherSamples,
    references: NDArray[np.float64], steps: Sequence[int], batch: int,
) -> Criterion:  # fmt: skip
    """Criterion 4: an engine's distance from the teacher over the reference's.

    Args:
        name: the engine.
        denoiser: its loaded denoiser.
        prompt: outputs of the prologue for the samples' embeddings, [2N, L, inner] each.
        plan: the sampler.
        samples: the teacher's trajectory.
        references: the reference's distances at ``steps``, [steps, N].
        steps: which steps.
        batch: the most samples that the engine takes at once.
    """
    row = identity_row(plan.slots)
    found = []
    for step in steps:
        inputs = samples.model_inputs[step].numpy()
        parts = []
        for start in range(0, len(inputs), batch):
            part = inputs[start : start + batch]
            feeds = step_feeds(plan, part, step, samples.guidance_scale, row)
            feeds |= {key: _halves(value, start, len(part)) for key, value in prompt.items()}
            if samples.extra is not None:
                feeds[EXTRA_CHANNELS] = samples.extra[start : start + len(part)].numpy()
            parts.append(denoiser.run(feeds)["latents_out"].astype(np.float32))
        found.append(samples.distances(np.concatenate(parts), step))
    return compare_distances(
        f"engine:{name}",
        f"distance({name}, teacher) over distance(reference, teacher)",
        ENGINE_LIMIT,
        steps,
        np.stack(found),
        np.maximum(references, _FLOAT_FLOOR),
    )


def compare_distances(
    name: str,
    says: str,
    limit: float,
    steps: Sequence[int],
    found: NDArray[np.float64],
    wanted: NDArray[np.float64],
) -> Criterion:
    """A criterion on the ratio of two mean distances from the teacher, [steps, N] each.

    One step has few samples, and each quantizes differently in the two: a step is forgiven what four standard errors
    of the paired difference make, and at least `_LEAST_CHANCE`. The ratio over all steps is forgiven nothing.
    """
    reference = wanted.mean(axis=1)
    count = wanted.shape[1]
    errors = (found - wanted).std(axis=1, ddof=1) / np.sqrt(count) / reference
    return Criterion(
        name=name,
        says=says,
        limit=limit,
        steps=tuple(steps),
        per_step=tuple(float(ratio) for ratio in found.mean(axis=1) / reference),
        chance=tuple(max(4 * float(error), _LEAST_CHANCE) for error in errors),
        overall=float(found.mean() / wanted.mean()),
        details={
            "samples": count,
            "distance": [float(f"{value:.4g}") for value in found.mean(axis=1)],
            "reference_distance": [float(f"{value:.4g}") for value in reference],
        },
        reference_by_sample=tuple(tuple(row) for row in wanted.tolist()),
    )


def _halves(value: NDArray[Any], start: int, count: int) -> NDArray[Any]:
    """The unconditional and conditional rows of samples start to start+count out of [2N, ...]."""
    middle = len(value) // 2
    return np.concatenate([value[start : start + count], value[middle + start : middle + start + count]])


def _float_graph(
    graphs: DenoiserGraphs, plan: SamplerPlan, samples: TeacherSamples, reference: Any, steps: list[int],
    on_stage: OnStage,
) -> Criterion:  # fmt: skip
    """1: with activation quantization bypassed, the graph's whole step against torch's in floating point."""
    bypassed = graphs.denoiser.clone()
    BypassActivations()(bypassed)
    runner = GraphRunner(bypassed, graphs.prologue, plan, samples.conditioning, samples.extra)
    figures = []
    with quantizers_off(reference):
        for done, step in enumerate(steps):
            wanted = guided(
                reference,
                samples.model_inputs[step],
                step,
                samples.conditioning,
                samples.guidance_scale,
                samples.extra,
            ).numpy()
            found = runner.output(samples.model_inputs[step], step, samples.guidance_scale)
            figures.append(_relative(found, wanted))
            if step in ends_and_middle(steps):
                figures[-1] = max(figures[-1], _step_error(runner, plan, samples, step, reference))
            on_stage("float_graph", done + 1, len(steps))
    return Criterion(
        name="float_graph",
        says="relative distance of the graph without activation quantization from torch",
        limit=FLOAT_LIMIT,
        steps=tuple(steps),
        per_step=tuple(figures),
    )


def float_distance(
    graphs: DenoiserGraphs, plan: SamplerPlan, samples: TeacherSamples, reference: Any, latents: Tensor, step: int,
    extra: Tensor | None,
) -> float:  # fmt: skip
    """Relative distance of the graph's guided output from torch's in floating point, on latents of any size."""
    bypassed = graphs.denoiser.clone()
    BypassActivations()(bypassed)
    runner = GraphRunner(bypassed, graphs.prologue, plan, samples.conditioning, extra)
    with quantizers_off(reference):
        wanted = guided(reference, latents, step, samples.conditioning, samples.guidance_scale, extra).numpy()
    return _relative(runner.output(latents, step, samples.guidance_scale), wanted)


def _step_error(runner: GraphRunner, plan: SamplerPlan, samples: TeacherSamples, step: int, reference: Any) -> float:
    """The sampler's update, history and noise included, against the same linear map in numpy."""
    generator = np.random.default_rng(step)
    shape = samples.model_inputs[step].shape
    state = generator.standard_normal((plan.slots, *shape)).astype(np.float32)
    noise = generator.standard_normal(shape).astype(np.float32)
    row = plan.coefficients[0, step]
    history = np.ascontiguousarray(np.moveaxis(state[1:], 0, 1))
    found = runner.run(step_feeds(plan, state[0], step, samples.guidance_scale, row, history, noise))
    step_map = plan.step_map(0, step)
    model_input = torch.from_numpy(np.tensordot(step_map.u, state, axes=1))
    output = guided(reference, model_input, step, samples.conditioning, samples.guidance_scale, samples.extra).numpy()
    add = np.multiply.outer(step_map.output, output) + np.multiply.outer(step_map.noise, noise)
    wanted = np.tensordot(step_map.matrix, state, axes=1) + add
    errors = [_relative(found["latents_out"], wanted[0])]
    if plan.history and np.any(wanted[1:]):
        errors.append(_relative(np.moveaxis(found["history_out"], 1, 0), wanted[1:]))
    return max(errors)


def _sites(
    graphs: DenoiserGraphs, plan: SamplerPlan, samples: TeacherSamples, reference: Any,
    checkpoint: QuantizedCheckpoint, steps: list[int], on_stage: OnStage,
) -> list[Criterion]:  # fmt: skip
    """2: every site on identical tensors: its integers, and its layers' outputs; first, middle and last step.

    It runs the graph once for every few dozen layers: where time is short, so that not all steps are looked at, one
    sample at the middle step has to do. A layer of that size has thousands of elements there.
    """
    chosen = ends_and_middle(steps)
    if len(steps) < plan.calls:
        chosen, samples = [steps[len(steps) // 2]], samples.first()
    spec = checkpoint.spec
    scales = {
        site.name: checkpoint.tensors[scale_key(site.name)].numpy()[list(site.groups)] for site in spec.activations
    }
    on_stage("sites", 0, len(chosen))
    found = measure_sites(graphs.denoiser, graphs.prologue, plan, samples, reference, spec, scales, chosen)
    on_stage("sites", len(chosen), len(chosen))
    # an integer that is off by more than one fails whatever its share
    integers = tuple(each.off_by_one if each.largest_difference <= 1 else 1.0 for each in found)
    outputs = tuple(each.output_error for each in found)
    return [
        Criterion(
            name="site_integers",
            says="share of a site's integers that differ from torch's on the same tensor",
            limit=INTEGER_LIMIT,
            steps=tuple(chosen),
            per_step=integers,
            worst_at=found[integers.index(max(integers))].worst_site,
            details={"sites": len(spec.activations)},
        ),
        Criterion(
            name="site_outputs",
            says="relative distance of a layer's output from torch's on the same integers",
            limit=FLOAT_LIMIT,
            steps=tuple(chosen),
            per_step=outputs,
            worst_at=found[outputs.index(max(outputs))].worst_layer,
            details={"layers": len(spec.weights)},
        ),
    ]


def _quantized_graph(
    graphs: DenoiserGraphs, plan: SamplerPlan, samples: TeacherSamples, reference: Any, steps: list[int],
    on_stage: OnStage,
) -> Criterion:  # fmt: skip
    """3: the quantized graph is no farther from the teacher than the fake-quantized torch model is."""
    runner = GraphRunner(graphs.denoiser, graphs.prologue, plan, samples.conditioning, samples.extra)
    found, wanted = [], []
    for done, step in enumerate(steps):
        inputs = samples.model_inputs[step]
        output = guided(reference, inputs, step, samples.conditioning, samples.guidance_scale, samples.extra)
        wanted.append(samples.distances(output, step))
        found.append(samples.distances(runner.output(inputs, step, samples.guidance_scale), step))
        on_stage("quantized_graph", done + 1, len(steps))
    says = "distance(graph, teacher) over distance(fake-quantized torch, teacher)"
    return compare_distances("quantized_graph", says, GRAPH_LIMIT, steps, np.stack(found), np.stack(wanted))


class quantizers_off:
    """The reference's activation quantizers disabled for a block; a floating-point reference has none."""

    def __init__(self, reference: Any) -> None:
        self.quantizers = list(getattr(reference, "quantizers", {}).values())

    def __enter__(self) -> None:
        self._set(False)

    def __exit__(self, *_: object) -> None:
        self._set(True)

    def _set(self, enabled: bool) -> None:
        for quantizer in self.quantizers:
            quantizer.enabled = enabled


def ends_and_middle(steps: Sequence[int]) -> list[int]:
    """Enough for what is the same graph at every step and costs a second run of it."""
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def _relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))
