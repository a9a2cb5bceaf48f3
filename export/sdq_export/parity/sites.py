"""Criterion 2 (docs/quantization.md, "Parity"): every site's integers and layers' outputs, on equal tensors."""

from __future__ import annotations

from sdq_export.checkpoint import QuantizedCheckpoint, scale_key
from sdq_export.parity.float_graph import FLOAT_LIMIT
from sdq_export.parity.inputs import DenoiserFiles, OnStep, ParityInputs
from sdq_export.parity.report import Criterion
from sdq_export.parity.site_figures import measure_sites
from sdq_export.reference import Reference

__all__ = ["INTEGER_LIMIT", "check_sites"]

INTEGER_LIMIT = 1e-4
"""The share of integers that may be off by one."""


def check_sites(
    inputs: ParityInputs,
    files: DenoiserFiles,
    reference: Reference,
    checkpoint: QuantizedCheckpoint,
    on_step: OnStep = lambda done, total: None,
) -> list[Criterion]:
    """2: every site on identical tensors: its integers, and its layers' outputs.

    Args:
        inputs: where to look.
        files: the canonical graphs.
        reference: the fake-quantized denoiser.
        checkpoint: the sites and their scales.
        on_step: hears how many steps are done.
    """
    chosen, spec = inputs.gate.site_steps, checkpoint.spec
    scales = {
        site.name: checkpoint.tensors[scale_key(site.name)].numpy()[list(site.groups)] for site in spec.activations
    }
    on_step(0, len(chosen))
    found = measure_sites(files.denoiser, inputs.samples, reference, spec, scales, chosen)
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
