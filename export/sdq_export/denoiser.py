"""The canonical graphs of a denoiser: the whole step and its prologue, from a captured one by a list of passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from sdq_engines.errors import SdqError
from sdq_export.families.network import GraphCuts
from sdq_export.graph import array_of
from sdq_export.passes.assign_weights import AssignWeights
from sdq_export.passes.clean_up import ClearNotes, RemoveDeadCode
from sdq_export.passes.fold_constants import FoldConstants
from sdq_export.passes.name_nodes import NameNodes
from sdq_export.passes.pack_weights import PackWeights
from sdq_export.passes.qdq import QuantizeActivations
from sdq_export.passes.quantize_weights import QuantizeWeights
from sdq_export.passes.sampler_step import LatentShape, SamplerStep
from sdq_export.passes.share_smoothing import ShareSmoothing
from sdq_export.passes.store_fp16 import StoreFp16
from sdq_export.passes.store_integers import StoreIntegers
from sdq_export.passes.timestep_scales import TimestepScales
from sdq_export.quantspec import QuantSpec
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.skeleton import is_hollow
from sdq_export.smoothing import smoothed_sites

__all__ = ["DenoiserGraphs", "build_denoiser", "run_passes"]

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class DenoiserGraphs:
    """The canonical graphs of docs/architecture.md."""

    denoiser: ir.Model
    """The whole step."""
    prologue: ir.Model
    """What depends on the prompts alone: keys and values of the text, and time rows where they depend on the prompt."""


def build_denoiser(
    captured: ir.Model,
    cuts: GraphCuts,
    plan: SamplerPlan,
    latent_shape: LatentShape,
    *,
    weights: Tensors | None = None,
    spec: QuantSpec | None = None,
    tensors: Tensors | None = None,
    store_fp16: bool = True,
    extra_channels: int = 0,
    integer_layers: Collection[str] = (),
) -> DenoiserGraphs:
    """Run the passes.

    Args:
        captured: as `Network.capture` gives it; it is used up.
        cuts: what divides it in two, by the family.
        plan: the sampler.
        latent_shape: C, h, w; the last two are names where the size is left free.
        weights: torch parameter name -> the value to use instead of the captured one.
        spec: the sites; None leaves the denoiser in floating point.
        tensors: integers and scales of the sites, by the keys of `sdq_export.checkpoint`.
        store_fp16: store large weights as FP16 where that loses nothing.
        extra_channels: of an inpainting denoiser.
        integer_layers: of the prologue, whose weights are stored as integers where that loses nothing.

    Raises:
        SdqError: the denoiser has a form that a pass does not support.
    """
    run_passes(captured, [NameNodes(), AssignWeights(weights or {}), FoldConstants()])
    prologue = captured.clone()
    storage = [StoreFp16()] if store_fp16 else []
    run_passes(prologue, [*cuts.prologue, StoreIntegers(integer_layers), *storage, ClearNotes()])
    quantization = _quantization(spec, tensors or {}) if spec is not None else []
    step = SamplerStep(plan.history, plan.stochastic, latent_shape, extra_channels)
    run_passes(
        captured,
        [
            *cuts.denoiser,
            *quantization,
            step,
            RemoveDeadCode(),
            *storage,
            ClearNotes(),
        ],
    )
    for graph in (prologue, captured):
        _require_values(graph)
    return DenoiserGraphs(captured, prologue)


def _require_values(model: ir.Model) -> None:
    """Every constant has values: what was captured of a skeleton has been given them."""
    for value in model.graph.initializers.values():
        if is_hollow(array_of(value)):
            raise RuntimeError(f"the graph's constant {value.name} was given no values")


def run_passes(model: ir.Model, passes: list[ir.passes.InPlacePass]) -> None:
    """Run passes in order, with their pre- and postconditions.

    Raises:
        SdqError: a precondition does not hold: the model has a form that is not supported.
    """
    for item in passes:
        try:
            item(model)
        except ir.passes.PreconditionError as error:
            reason = str(error.__cause__ or error)
            raise SdqError(f"The denoiser has a form that {type(item).__name__} does not support: {reason}.") from error


def _quantization(spec: QuantSpec, tensors: Tensors) -> list[ir.passes.InPlacePass]:
    constant = [site for site in spec.activations if site.num_groups == 1]
    stepped = [site for site in spec.activations if site.num_groups > 1]
    smoothed = set(smoothed_sites(spec, tensors))
    return [
        ShareSmoothing([site for site in spec.activations if site.name in smoothed]),
        QuantizeWeights(spec, tensors),
        QuantizeActivations(constant, tensors),
        TimestepScales(stepped, tensors),
        PackWeights(),
    ]
