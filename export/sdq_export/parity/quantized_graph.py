"""Criterion 3 (docs/quantization.md, "Parity"): the quantized graph is no farther from the teacher than torch is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from sdq_export.parity.distances import compare_distances
from sdq_export.parity.inputs import DenoiserFiles, OnStep, ParityInputs
from sdq_export.parity.report import Criterion

__all__ = ["GRAPH_LIMIT", "check_quantized_graph"]

GRAPH_LIMIT = 1.05
"""distance(graph, teacher) / distance(fake-quantized torch, teacher)."""


def check_quantized_graph(
    inputs: ParityInputs,
    files: DenoiserFiles,
    expected: Mapping[int, Tensor],
    on_step: OnStep = lambda done, total: None,
) -> Criterion:
    """3: the quantized graph is no farther from the teacher than the fake-quantized torch model is.

    Args:
        inputs: where to look.
        files: the canonical graphs.
        expected: step -> what the fake-quantized torch model answered there.
        on_step: hears how many steps are done.
    """
    samples, gate = inputs.samples, inputs.gate
    runner = inputs.runner(files.denoiser, files.prologue)
    found, wanted = [], []
    for done, step in enumerate(gate.steps):
        wanted.append(samples.distances(expected[step], step))
        output = runner.output(samples.model_inputs[step], step, samples.guidance.scale)
        found.append(samples.distances(output, step))
        on_step(done + 1, len(gate.steps))
    says = "distance(graph, teacher) over distance(fake-quantized torch, teacher)"
    return compare_distances("quantized_graph", says, GRAPH_LIMIT, gate.steps, np.stack(found), np.stack(wanted))
