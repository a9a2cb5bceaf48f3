"""All canonical graphs of a package, made from a source checkpoint and, if there is one, a quantized checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Hashable, Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.package.layout import DENOISER, PROLOGUE, VAE_DECODER, VAE_ENCODER
from sdq_export.capture import capture
from sdq_export.captures import KEPT_BYTES, capture_once
from sdq_export.checkpoint import QuantizedCheckpoint, weight_key
from sdq_export.denoiser import DenoiserGraphs, build_denoiser, run_passes
from sdq_export.families.base import TextEncoder
from sdq_export.families.vae import VaeDecoder, VaeEncoder, capture_vae_decoder, capture_vae_encoder
from sdq_export.integer_storage import component_layers, round_to_integers_
from sdq_export.passes.clean_up import ClearNotes, RemoveDeadCode
from sdq_export.passes.fold_constants import FoldConstants
from sdq_export.passes.name_nodes import NameNodes
from sdq_export.passes.store_fp16 import StoreFp16
from sdq_export.passes.store_integers import StoreIntegers
from sdq_export.reference import build_reference
from sdq_export.rounding import as_numpy
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.sizes import HEIGHT, WIDTH
from sdq_export.smoothing import divide_inputs_, smoothed_sites
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser
from sdq_export.storage import Dtype, IntegerDtype, round_weights_

__all__ = [
    "component_names",
    "make_denoiser",
    "make_reference",
    "make_text_encoder",
    "make_vae_decoder",
    "make_vae_encoder",
]


def component_names(source: Source, vae_encoder: bool) -> list[str]:
    """A package's components, in the order in which a prompt passes through them."""
    texts = [encoder.component for encoder in source.family.text_encoders]
    return [*texts, PROLOGUE, DENOISER, VAE_DECODER, *([VAE_ENCODER] if vae_encoder else [])]


def make_reference(
    source: Source, plan: SamplerPlan, checkpoint: QuantizedCheckpoint | None, dtype: Dtype
) -> StepDenoiser:
    """The torch denoiser that the package must equal: fake-quantized or not, its weights as they will be stored."""
    timesteps = torch.from_numpy(plan.timesteps)
    if checkpoint is None:
        reference = StepDenoiser(source.own(source.family.denoiser), timesteps).eval().requires_grad_(False)
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
    reference: StepDenoiser,
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
    family, shape, skeleton = source.family, source.family.latent_shape(source), source.skeleton
    multiple = family.latent_multiple(skeleton) if free_size else 0
    smoothed = smoothed_sites(checkpoint.spec, checkpoint.tensors) if checkpoint else ()

    def capture_it() -> ir.Model:
        model = skeleton
        if checkpoint is not None and smoothed:
            model = divide_inputs_(copy.deepcopy(skeleton), checkpoint.spec, checkpoint.tensors)
        return family.capture_denoiser(model, shape, _tokens(source), multiple)

    captured = capture_once((_architecture(source), _tokens(source), smoothed, multiple), capture_it)
    # a quantized layer's weight comes as integers; a layer of its own would be one more copy of it in FP32
    integers = {weight_key(site.layer) for site in checkpoint.spec.weights} if checkpoint else set()
    return build_denoiser(
        captured,
        family.cuts(reference.tables),
        plan,
        (shape[0], HEIGHT, WIDTH) if free_size else shape,
        weights={name: tensor.numpy() for name, tensor in _tensors(reference.model) if name not in integers},
        spec=checkpoint.spec if checkpoint else None,
        tensors={name: as_numpy(tensor) for name, tensor in checkpoint.tensors.items()} if checkpoint else None,
        store_fp16=dtype == "fp16",
        extra_channels=family.extra_channels(skeleton),
        integer_layers=integer_layers,
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint does not save: what is left of the time path."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
    yield from model.named_buffers()


def make_text_encoder(
    source: Source, encoder: TextEncoder, dtype: Dtype, integers: IntegerDtype | None = None
) -> tuple[ir.Model, nn.Module]:
    """A text encoder's graph, and the torch module that it equals."""
    module = encoder.module(source, _stored(source, encoder.component, dtype, integers))
    example = torch.zeros(2, encoder.length(source), dtype=torch.int64)
    tokenizer = source.hashes[encoder.tokenizer]
    captured = _capture_part(
        source,
        encoder.component,
        # the rows of textual inversions are at the tokenizer's numbers
        (encoder.wrap, encoder.output_names(source), example.shape, dtype, integers, source.told, tokenizer),
        lambda: capture(module, {"input_ids": example}, batched=["input_ids"], outputs=encoder.output_names(source)),
    )
    return _finished(captured, dtype, integers), module


def make_vae_decoder(
    source: Source, dtype: Dtype, free_size: bool = False, integers: IntegerDtype | None = None
) -> tuple[ir.Model, nn.Module]:
    """The decoder's graph, and the torch module that it equals."""
    module, shape = VaeDecoder(_stored(source, "vae", dtype, integers)), source.family.latent_shape(source)
    captured = _capture_part(
        source,
        "vae",
        (VAE_DECODER, shape, dtype, integers, free_size),
        lambda: capture_vae_decoder(module, shape, free_size),
    )
    return _finished(captured, dtype, integers), module


def make_vae_encoder(
    source: Source, dtype: Dtype, free_size: bool = False, integers: IntegerDtype | None = None
) -> tuple[ir.Model, nn.Module]:
    """The encoder's graph, and the torch module that it equals."""
    module, size = VaeEncoder(_stored(source, "vae", dtype, integers)), source.family.image_size(source)
    multiple = source.family.pixels_per_latent(source) if free_size else 0
    captured = _capture_part(
        source,
        "vae",
        (VAE_ENCODER, size, dtype, integers, multiple),
        lambda: capture_vae_encoder(module, size, multiple),
    )
    return _finished(captured, dtype, integers), module


def _tokens(source: Source) -> int:
    """Tokens of a prompt for the first text encoder, all chunks."""
    encoder = source.family.text_encoders[0]
    return encoder.chunks(source) * encoder.length(source)


def _architecture(source: Source) -> tuple[Hashable, ...]:
    """What a graph of the denoiser's skeleton depends on."""
    config = {key: value for key, value in source.skeleton.config.items() if not key.startswith("_")}
    # the adapter and not its name: Stable Diffusion 3 with and without T5 share that, and have texts of other lengths
    return type(source.family), json.dumps(config, sort_keys=True, default=str), source.splits_shortcuts


def _capture_part(source: Source, part: str, key: tuple[Hashable, ...], make: Callable[[], ir.Model]) -> ir.Model:
    """A text encoder's or the VAE's graph, which holds its weights; not kept where they are large.

    Args:
        source: the checkpoint.
        part: of the checkpoint.
        key: what else the graph depends on.
        make: captures it.
    """
    if source.weights_bytes(part) > KEPT_BYTES:
        return make()
    return capture_once((source.hashes[part], *key), make)


def _stored(source: Source, part: str, dtype: Dtype, integers: IntegerDtype | None) -> nn.Module:
    stored: nn.Module = source.own(part)
    if dtype == "fp16":
        round_weights_(stored)
    if integers is not None:
        round_to_integers_(stored, component_layers(stored), integers)
    return stored


def _finished(model: ir.Model, dtype: Dtype, integers: IntegerDtype | None) -> ir.Model:
    storage: list[ir.passes.InPlacePass] = [] if integers is None else [StoreIntegers()]
    storage += [StoreFp16()] if dtype == "fp16" else []
    run_passes(model, [NameNodes(), RemoveDeadCode(), FoldConstants(), *storage, ClearNotes()])
    return model
