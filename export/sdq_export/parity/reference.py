"""What torch answers at the places that the gate looks at: written down, so that no model is kept beside a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdq_export.parity.inputs import ParityInputs
from sdq_export.parity.samples import TeacherSamples
from sdq_export.reference import Reference

__all__ = ["ReferenceOutputs", "answer", "reference_outputs"]


@dataclass(frozen=True)
class ReferenceOutputs:
    """Guided outputs of the reference by step, float32 [N, C, h, w] each.

    Attributes:
        floating: with activation quantization off.
        quantized: with it on; empty for a floating-point package.
    """

    floating: Mapping[int, Tensor]
    quantized: Mapping[int, Tensor]


def reference_outputs(
    reference: Reference,
    inputs: ParityInputs,
    quantized: bool,
    on_call: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceOutputs:
    """Run the reference at the gate's steps on the teacher's inputs.

    Args:
        reference: what the graphs must equal.
        inputs: where to look.
        quantized: whether the reference is fake-quantized.
        on_call: hears how many of the calls are done.
    """
    samples, gate = inputs.samples, inputs.gate
    floating, rounded = dict[int, Tensor](), dict[int, Tensor]()
    total = len(gate.steps) * (2 if quantized else 1)
    with reference.quantizers_off():
        for step in gate.steps:
            floating[step] = answer(reference, samples, step)
            on_call(len(floating), total)
    for step in gate.steps if quantized else ():
        rounded[step] = answer(reference, samples, step)
        on_call(len(floating) + len(rounded), total)
    return ReferenceOutputs(floating, rounded)


def answer(reference: Reference, samples: TeacherSamples, step: int) -> Tensor:
    """The reference's guided output on the teacher's inputs of a step."""
    return samples.guided(reference, samples.extra)(samples.model_inputs[step], step)
