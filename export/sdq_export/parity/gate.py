"""The four criteria (docs/quantization.md, "Parity")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.backends.base import Component
from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_export.checkpoint import QuantizedCheckpoint, scale_key
from sdq_export.parity.budget import Gate
from sdq_export.parity.graphs import GraphFile, GraphRunner, identity_row, step_feeds, without_activations
from sdq_export.parity.reference import ReferenceOutputs
from sdq_export.parity.report import Criterion
from sdq_export.parity.samples import TeacherSamples
from sdq_export.parity.sites import measure_sites
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.scratch import temporary_folder

__all__ = [
    "ENGINE_LIMIT",
    "FLOAT_LIMIT",
    "GRAPH_LIMIT",
    "INTEGER_LIMIT",
    "DenoiserFiles",
    "check_engine",
    "check_float_graph",
    "check_quantized_graph",
    "check_sites",
    "compare_distances",
    "relative",
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

_FEW_PLACES = 12
_ONE_SAMPLE_CHANCE = 0.15
"""The same where a step has one sample, whose scatter cannot be told from it."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class DenoiserFiles:
    """The canonical graphs on disk."""

    denoiser: GraphFile
    prologue: GraphFile


def check_float_graph(
    files: DenoiserFiles,
    plan: SamplerPlan,
    samples: TeacherSamples,
    expected: ReferenceOutputs,
    gate: Gate,
    quantized: bool,
    device: str = "cpu",
    on_step: OnStep = lambda done, total: None,
) -> Criterion:
    """1: with activation quantization bypassed, the graph against torch in floating point; its whole step too.

    Args:
        files: the canonical graphs.
        plan: the sampler.
        samples: the teacher's inputs.
        expected: what torch answered there, with the weights as they are stored.
        gate: the steps.
        quantized: whether there is anything to bypass.
        device: where the graph runs.
        on_step: hears how many steps are done, and of how many.
    """
    figures = []
    with temporary_folder() as folder:
        denoiser = without_activations(files.denoiser, Path(folder)) if quantized else files.denoiser
        runner = GraphRunner(denoiser, files.prologue, plan, samples.conditioning, samples.extra, device)
        for done, step in enumerate(gate.steps):
            found = runner.output(samples.model_inputs[step], step, samples.guidance.scale)
            figures.append(relative(found, expected.floating[step].numpy()))
            if step in gate.site_steps:
                figures[-1] = max(figures[-1], _step_error(runner, plan, samples, step, expected.floating[step]))
            on_step(done + 1, len(gate.steps))
        del runner  # Windows removes no file that is still mapped
    return Criterion(
        name="float_graph",
        says="relative distance of the graph without activation quantization from torch",
        limit=FLOAT_LIMIT,
        steps=gate.steps,
        per_step=tuple(figures),
    )


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
            feeds = step_feeds(plan, part, step, samples.guidance.scale, row)
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
    of the paired difference make, and at least `_LEAST_CHANCE`; where it has one sample, which has no such error,
    `_ONE_SAMPLE_CHANCE`. The ratio over all steps is forgiven nothing where there are places (steps times samples)
    enough; with few, its own two standard errors, at most `_LEAST_CHANCE`. Their interval is in the details.
    """
    reference = wanted.mean(axis=1)
    count, places = wanted.shape[1], wanted.size
    overall = float(found.mean() / wanted.mean())
    error = float((found - overall * wanted).std(ddof=1) / np.sqrt(places) / wanted.mean()) if places > 1 else 0.0
    return Criterion(
        name=name,
        says=says,
        limit=limit,
        steps=tuple(steps),
        per_step=tuple(float(ratio) for ratio in found.mean(axis=1) / reference),
        chance=_step_chances(found, wanted),
        overall=overall,
        overall_chance=min(2 * error, _LEAST_CHANCE) if places < _FEW_PLACES else 0.0,
        details={
            "samples": count,
            "interval": [float(f"{bound:.4g}") for bound in (overall - 2 * error, overall + 2 * error)],
            "distance": [float(f"{value:.4g}") for value in found.mean(axis=1)],
            "reference_distance": [float(f"{value:.4g}") for value in reference],
        },
        reference_by_sample=tuple(tuple(row) for row in wanted.tolist()),
    )


def _step_chances(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, ...]:
    steps, count = wanted.shape
    if count == 1:
        return (_ONE_SAMPLE_CHANCE,) * steps
    errors = (found - wanted).std(axis=1, ddof=1) / np.sqrt(count) / wanted.mean(axis=1)
    return tuple(max(4 * float(error), _LEAST_CHANCE) for error in errors)


def _halves(value: NDArray[Any], start: int, count: int) -> NDArray[Any]:
    """The unconditional and conditional rows of samples start to start+count out of [2N, ...]."""
    middle = len(value) // 2
    return np.concatenate([value[start : start + count], value[middle + start : middle + start + count]])


def _step_error(runner: GraphRunner, plan: SamplerPlan, samples: TeacherSamples, step: int, output: Tensor) -> float:
    """The sampler's update, history and noise included, against the same linear map of torch's output in numpy.

    The history is random; the latents are such that the model is given the teacher's input, so that torch's answer is
    known.
    """
    generator = np.random.default_rng(step)
    shape = samples.shape
    step_map = plan.step_map(0, step)
    slot = int(np.abs(step_map.u).argmax())
    state = generator.standard_normal((plan.slots, *shape)).astype(np.float32)
    noise = generator.standard_normal(shape).astype(np.float32)
    others = np.tensordot(step_map.u, state, axes=1) - step_map.u[slot] * state[slot]
    state[slot] = (samples.model_inputs[step].numpy() - others) / step_map.u[slot]
    history = np.ascontiguousarray(np.moveaxis(state[1:], 0, 1))
    row = plan.coefficients[0, step]
    found = runner.run(step_feeds(plan, state[0], step, samples.guidance.scale, row, history, noise))
    add = np.multiply.outer(step_map.output, output.numpy()) + np.multiply.outer(step_map.noise, noise)
    wanted = np.tensordot(step_map.matrix, state, axes=1) + add
    errors = [relative(found["latents_out"], wanted[0])]
    if plan.history and np.any(wanted[1:]):
        errors.append(relative(np.moveaxis(found["history_out"], 1, 0), wanted[1:]))
    return max(errors)


def check_sites(
    files: DenoiserFiles, samples: TeacherSamples, reference: Any, checkpoint: QuantizedCheckpoint, gate: Gate,
    on_step: OnStep = lambda done, total: None,
) -> list[Criterion]:  # fmt: skip
    """2: every site on identical tensors: its integers, and its layers' outputs.

    Args:
        files: the canonical graphs.
        samples: the teacher's inputs.
        reference: the fake-quantized StepDenoiser.
        checkpoint: the sites and their scales.
        gate: the steps.
        on_step: hears how many steps are done, and of how many.
    """
    chosen, spec = gate.site_steps, checkpoint.spec
    scales = {
        site.name: checkpoint.tensors[scale_key(site.name)].numpy()[list(site.groups)] for site in spec.activations
    }
    on_step(0, len(chosen))
    found = measure_sites(files.denoiser, samples, reference, spec, scales, chosen)
    on_step(len(chosen), len(chosen))
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


def check_quantized_graph(
    files: DenoiserFiles,
    plan: SamplerPlan,
    samples: TeacherSamples,
    expected: ReferenceOutputs,
    gate: Gate,
    device: str = "cpu",
    on_step: OnStep = lambda done, total: None,
) -> Criterion:
    """3: the quantized graph is no farther from the teacher than the fake-quantized torch model is.

    Arguments as of `check_float_graph`.
    """
    runner = GraphRunner(files.denoiser, files.prologue, plan, samples.conditioning, samples.extra, device)
    found, wanted = [], []
    for done, step in enumerate(gate.steps):
        wanted.append(samples.distances(expected.quantized[step], step))
        output = runner.output(samples.model_inputs[step], step, samples.guidance.scale)
        found.append(samples.distances(output, step))
        on_step(done + 1, len(gate.steps))
    says = "distance(graph, teacher) over distance(fake-quantized torch, teacher)"
    return compare_distances("quantized_graph", says, GRAPH_LIMIT, gate.steps, np.stack(found), np.stack(wanted))


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative L2 distance of one array from another."""
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))
