"""All canonical graphs of a package, made from a source checkpoint and, if there is one, a quantized checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn

from sdq_engines.package.layout import DENOISER, PROLOGUE, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.denoiser import DenoiserGraphs, build_denoiser, run_passes
from sdq_export.families import sd
from sdq_export.inpainting import extra_channels
from sdq_export.passes.clean_up import ClearNotes, RemoveDeadCode
from sdq_export.passes.name_nodes import NameNodes
from sdq_export.passes.store_fp16 import StoreFp16
from sdq_export.reference import build_reference
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.sizes import HEIGHT, WIDTH
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser, time_tables
from sdq_export.storage import round_weights_
from sdq_export.vae_encoder import capture_vae_encoder

__all__ = [
    "Components",
    "Dtype",
    "make_denoiser",
    "make_reference",
    "make_text_encoder",
    "make_vae_decoder",
    "make_vae_encoder",
]

_KEPT_BYTES = 256 << 20

Dtype = Literal["fp32", "fp16"]
"""How floating-point weights are stored; graphs compute in FP32 either way."""


@dataclass(frozen=True)
class Components:
    """The graphs; an encoder is there where the package may start from images."""

    text_encoder: ir.Model
    denoiser: DenoiserGraphs
    vae_decoder: ir.Model
    vae_encoder: ir.Model | None = None

    def by_name(self) -> dict[str, ir.Model]:
        """Component name -> graph."""
        graphs = {
            TEXT_ENCODER: self.text_encoder,
            PROLOGUE: self.denoiser.prologue,
            DENOISER: self.denoiser.denoiser,
            VAE_DECODER: self.vae_decoder,
        }
        return graphs if self.vae_encoder is None else {**graphs, VAE_ENCODER: self.vae_encoder}


def make_reference(
    source: Source, plan: SamplerPlan, checkpoint: QuantizedCheckpoint | None, dtype: Dtype
) -> StepDenoiser:
    """The torch denoiser that the package must equal: fake-quantized or not, its weights as they will be stored."""
    timesteps = torch.from_numpy(plan.timesteps)
    if checkpoint is None:
        reference = StepDenoiser(copy.deepcopy(source.unet), timesteps).eval().requires_grad_(False)
        integers: set[str] = set()
    else:
        reference = build_reference(source.unet, checkpoint.spec, checkpoint.tensors, timesteps)
        integers = {site.layer for site in checkpoint.spec.weights}
    if dtype == "fp16":
        round_weights_(reference.unet, skip=integers)
    return reference


def make_denoiser(
    source: Source,
    plan: SamplerPlan,
    reference: StepDenoiser,
    checkpoint: QuantizedCheckpoint | None,
    dtype: Dtype,
    free_size: bool = False,
) -> DenoiserGraphs:
    """Capture the source's UNet, give it the reference's weights, and run the passes."""
    shape, tokens = sd.latent_shape(source), int(source.tokenizer.model_max_length)
    captured = _capture_once(
        source, f"{DENOISER} {free_size}", lambda: sd.capture_denoiser(source.unet, shape, tokens, free_size)
    )
    # the time path is in the UNet alone: its tables come from the source's own weights, as in training
    tables = time_tables(source.unet, torch.from_numpy(plan.timesteps))
    return build_denoiser(
        captured,
        {block: table.numpy() for block, table in tables.items()},
        plan,
        (shape[0], HEIGHT, WIDTH) if free_size else shape,
        weights={name: tensor.numpy() for name, tensor in reference.unet.state_dict().items()},
        spec=checkpoint.spec if checkpoint else None,
        tensors={name: tensor.numpy() for name, tensor in checkpoint.tensors.items()} if checkpoint else None,
        store_fp16=dtype == "fp16",
        extra_channels=extra_channels(source.unet),
    )


def make_text_encoder(source: Source, dtype: Dtype) -> tuple[ir.Model, nn.Module]:
    """The text encoder's graph, and the torch module that it equals."""
    module, tokens = _stored(source.text_encoder, dtype), int(source.tokenizer.model_max_length)
    captured = _capture_once(source, f"{TEXT_ENCODER} {dtype}", lambda: sd.capture_text_encoder(module, tokens))
    return _finished(captured, dtype), module


def make_vae_decoder(source: Source, dtype: Dtype, free_size: bool = False) -> tuple[ir.Model, nn.Module]:
    """The decoder's graph, and the torch VAE that it equals."""
    module, shape = _stored(source.vae, dtype), sd.latent_shape(source)
    captured = _capture_once(
        source, f"{VAE_DECODER} {dtype} {free_size}", lambda: sd.capture_vae_decoder(module, shape, free_size)
    )
    return _finished(captured, dtype), module


def make_vae_encoder(source: Source, dtype: Dtype, free_size: bool = False) -> tuple[ir.Model, nn.Module]:
    """The encoder's graph, and the torch VAE that it equals."""
    module, (_, height, width) = _stored(source.vae, dtype), sd.latent_shape(source)
    factor = sd.pixels_per_latent(source)
    size = (height * factor, width * factor)
    captured = _capture_once(
        source, f"{VAE_ENCODER} {dtype} {free_size}", lambda: capture_vae_encoder(module, size, free_size)
    )
    return _finished(captured, dtype), module


_captured: dict[tuple[Path, str, str], ir.Model] = {}


def _capture_once(source: Source, what: str, make: Callable[[], ir.Model]) -> ir.Model:
    """A graph to edit: captured, or copied from the capture that an earlier export of this process made.

    Tracing a UNet takes seconds whatever its size, and a demo exports the same small model several times. A large
    model's weights are not kept in memory for that.
    """
    key = (source.folder, source.sha256, what)
    if key not in _captured:
        model = make()
        if (
            sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
            > _KEPT_BYTES
        ):
            return model
        _captured[key] = model
    return _captured[key].clone()


def _stored(module: Any, dtype: Dtype) -> nn.Module:
    stored: nn.Module = copy.deepcopy(module)
    if dtype == "fp16":
        round_weights_(stored)
    return stored


def _finished(model: ir.Model, dtype: Dtype) -> ir.Model:
    storage = [StoreFp16()] if dtype == "fp16" else []
    run_passes(model, [NameNodes(), RemoveDeadCode(), *storage, ClearNotes()])
    return model
