"""The denoiser of an export: the torch reference, and the graphs that must equal it."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_export.captures import capture_once
from sdq_export.checkpoint import QuantizedCheckpoint, weight_key
from sdq_export.denoiser import DenoiserGraphs, build_denoiser
from sdq_export.reference import Reference, build_reference
from sdq_export.rounding import as_numpy
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.sizes import HEIGHT, WIDTH
from sdq_export.skeleton import copy_module
from sdq_export.smoothing import divide_inputs_, smoothed_sites
from sdq_export.source import Source
from sdq_export.storage import Dtype, round_weights_

__all__ = ["make_denoiser", "make_reference"]


def make_reference(
    source: Source, plan: SamplerPlan, checkpoint: QuantizedCheckpoint | None, dtype: Dtype
) -> Reference:
    """The torch denoiser that the package must equal: fake-quantized or not, its weights as they will be stored."""
    timesteps = torch.from_numpy(plan.timesteps)
    if checkpoint is None:
        reference = Reference(source.own(source.family.denoiser), timesteps)
        reference.eval().requires_grad_(False)
        integers: set[str] = set()
    else:
        reference = build_reference(source.own(source.family.denoiser), checkpoint.spec, checkpoint.tensors, timesteps)
        integers = {site.layer for site in checkpoint.spec.weights}
    if dtype == "fp16":
        round_weights_(reference.model, skip=integers)
    return reference


def make_denoiser(
    source: Source,
    plan: SamplerPlan,
    reference: Reference,
    checkpoint: QuantizedCheckpoint | None,
    dtype: Dtype,
    free_size: bool = False,
    integer_layers: Collection[str] = (),
) -> DenoiserGraphs:
    """Capture the source's denoiser without its weights, give the graph the reference's, and run the passes.

    Args:
        source: the checkpoint, of which the architecture alone is read.
        plan: the sampler.
        reference: has the weights that the graphs get.
        checkpoint: the sites, for a quantized denoiser.
        dtype: how floating-point weights are stored.
        free_size: height and width of the latents are symbols.
        integer_layers: of the prologue, whose weights the reference has rounded to integers.

    Raises:
        SdqError: the denoiser has an unsupported form, or is of one size and ought to be of any.
    """
    family, skeleton = source.family, source.skeleton
    shape, network, tokens = family.latent_shape, family.network, family.prompt_tokens
    multiple = family.latent_multiple if free_size else 0
    smoothed = smoothed_sites(checkpoint.spec, checkpoint.tensors) if checkpoint else ()

    def capture_it() -> ir.Model:
        model = skeleton
        if checkpoint is not None and smoothed:
            model = divide_inputs_(copy_module(skeleton), checkpoint.spec, checkpoint.tensors)
        return network.capture(model, shape, tokens, multiple)

    captured = capture_once((_architecture(source), tokens, smoothed, multiple), capture_it)
    # a quantized layer's weight comes as integers; a layer of its own would be one more copy of it in FP32
    integers = {weight_key(site.layer) for site in checkpoint.spec.weights} if checkpoint else set()
    return build_denoiser(
        captured,
        network.cuts(reference.tables),
        plan,
        (shape[0], HEIGHT, WIDTH) if free_size else shape,
        weights={name: tensor.numpy() for name, tensor in _tensors(reference.model) if name not in integers},
        spec=checkpoint.spec if checkpoint else None,
        tensors={name: as_numpy(tensor) for name, tensor in checkpoint.tensors.items()} if checkpoint else None,
        store_fp16=dtype == "fp16",
        extra_channels=family.extra_channels,
        integer_layers=integer_layers,
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint does not save: what is left of the time path."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
    yield from model.named_buffers()


def _architecture(source: Source) -> tuple[Hashable, ...]:
    """What a graph of the denoiser's skeleton depends on."""
    config = {key: value for key, value in source.skeleton.config.items() if not key.startswith("_")}
    # the adapter and not its name: Stable Diffusion 3 with and without T5 share that, and have texts of other lengths
    return source.kind_of_family, json.dumps(config, sort_keys=True, default=str), source.splits_shortcuts
