"""What torch answers at the places that the gate looks at: written down, so that no model is kept beside a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdq_export.parity.budget import Gate
from sdq_export.parity.samples import TeacherSamples

__all__ = ["ReferenceOutputs", "answer", "quantizers_off", "reference_outputs"]


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
    reference: Any,
    samples: TeacherSamples,
    gate: Gate,
    quantized: bool,
    on_call: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceOutputs:
    """Run the reference at the gate's steps on the teacher's inputs.

    Args:
        reference: the torch StepDenoiser that the graphs must equal.
        samples: the teacher's inputs.
        gate: the steps.
        quantized: whether the reference is fake-quantized.
        on_call: hears how many of the calls are done.
    """
    floating, rounded = dict[int, Tensor](), dict[int, Tensor]()
    total = len(gate.steps) * (2 if quantized else 1)
    with quantizers_off(reference):
        for step in gate.steps:
            floating[step] = answer(reference, samples, step)
            on_call(len(floating), total)
    for step in gate.steps if quantized else ():
        rounded[step] = answer(reference, samples, step)
        on_call(len(floating) + len(rounded), total)
    return ReferenceOutputs(floating, rounded)


def answer(reference: Any, samples: TeacherSamples, step: int) -> Tensor:
    """The reference's guided output on the teacher's inputs of a step."""
    return samples.guided(reference, samples.extra)(samples.model_inputs[step], step)


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
