"""Criterion 1 (docs/quantization.md, "Parity"): the graph in floating point, and its whole step, against torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from sdq_export.parity.distances import relative
from sdq_export.parity.graphs import GraphRunner, step_feeds, without_activations
from sdq_export.parity.inputs import DenoiserFiles, OnStep, ParityInputs
from sdq_export.parity.report import Criterion
from sdq_export.scratch import temporary_folder

__all__ = ["FLOAT_LIMIT", "check_float_graph"]

FLOAT_LIMIT = 1e-4
"""Relative L2; of the layers' outputs of criterion 2 too."""


def check_float_graph(
    inputs: ParityInputs,
    files: DenoiserFiles,
    expected: Mapping[int, Tensor],
    quantized: bool,
    on_step: OnStep = lambda done, total: None,
) -> Criterion:
    """1: with activation quantization bypassed, the graph against torch in floating point; its whole step too.

    Args:
        inputs: where to look.
        files: the canonical graphs.
        expected: step -> what torch answered there in floating point, with the weights as they are stored.
        quantized: whether there is anything to bypass.
        on_step: hears how many steps are done.
    """
    samples, gate = inputs.samples, inputs.gate
    figures = []
    with temporary_folder() as folder:
        denoiser = without_activations(files.denoiser, Path(folder)) if quantized else files.denoiser
        runner = inputs.runner(denoiser, files.prologue)
        for done, step in enumerate(gate.steps):
            found = runner.output(samples.model_inputs[step], step, samples.guidance.scale)
            figures.append(relative(found, expected[step].numpy()))
            if step in gate.site_steps:
                figures[-1] = max(figures[-1], _step_error(runner, inputs, step, expected[step]))
            on_step(done + 1, len(gate.steps))
        del runner  # Windows removes no file that is still mapped
    return Criterion(
        name="float_graph",
        says="relative distance of the graph without activation quantization from torch",
        limit=FLOAT_LIMIT,
        steps=gate.steps,
        per_step=tuple(figures),
    )


def _step_error(runner: GraphRunner, inputs: ParityInputs, step: int, output: Tensor) -> float:
    """The sampler's update, history and noise included, against the same linear map of torch's output in numpy.

    The history is random; the latents are such that the model is given the teacher's input, so that torch's answer is
    known.
    """
    plan, samples = inputs.plan, inputs.samples
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
