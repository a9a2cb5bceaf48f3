"""What integer weights of the prologue cost: measured before they are accepted."""

from __future__ import annotations

import numpy as np

from sdq_export.integer_storage import round_to_integers_
from sdq_export.parity.inputs import ParityInputs
from sdq_export.parity.quantized_graph import GRAPH_LIMIT
from sdq_export.parity.reference import answer
from sdq_export.parity.report import Criterion
from sdq_export.reference import Reference
from sdq_export.storage import IntegerDtype

__all__ = ["round_prologue_"]


def round_prologue_(
    reference: Reference, inputs: ParityInputs, dtype: IntegerDtype = "int8"
) -> tuple[list[str], Criterion]:
    """Round the reference's prologue layers to integers, in place.

    Their error e is measured with activation quantization off, where no rounding amplifies it, and held against the
    error q of the quantized reference: independent errors add in squares, so sqrt(1 + (e/q)^2) is held to the limit
    of a graph (criterion 3). At 1.05 that is e <= 0.32 q.

    Args:
        reference: the fake-quantized denoiser.
        inputs: where to look.
        dtype: what they are rounded to.

    Returns:
        The layers' paths, and the criterion.
    """
    samples, steps = inputs.samples, inputs.gate.site_steps
    quantized = [float(samples.distances(answer(reference, samples, step), step).mean()) for step in steps]
    with reference.quantizers_off():
        before = [answer(reference, samples, step) for step in steps]
        layers = reference.prologue_layers
        round_to_integers_(reference.model, layers, dtype)
        after = [answer(reference, samples, step) for step in steps]
    errors = [float((new - old).norm() / old.norm()) for new, old in zip(after, before, strict=True)]
    ratios = [float(np.hypot(1.0, error / max(q, 1e-12))) for error, q in zip(errors, quantized, strict=True)]
    return layers, Criterion(
        name=f"{dtype}_prologue",
        says=f"the quantization error with that of an {dtype.upper()} prologue added in squares, "
        "over the quantization error",
        limit=GRAPH_LIMIT,
        steps=tuple(steps),
        per_step=tuple(ratios),
        details={"layers": len(layers), "error": errors, "quantization_error": quantized},
        hint="Keep more of it: leave --prologue out for FP16, or --prologue int8.",
    )
