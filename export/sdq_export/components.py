"""Canonical graphs of the components beside the denoiser, made from a source checkpoint."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir
from torch import nn

from sdq_engines.package.layout import DENOISER, PROLOGUE, VAE_DECODER, VAE_ENCODER
from sdq_export.capture import capture
from sdq_export.captures import KEPT_BYTES, capture_once
from sdq_export.denoiser import run_passes
from sdq_export.families.component import ComponentExport
from sdq_export.integer_storage import component_layers, round_to_integers_
from sdq_export.passes.clean_up import ClearNotes, RemoveDeadCode
from sdq_export.passes.fold_constants import FoldConstants
from sdq_export.passes.name_nodes import NameNodes
from sdq_export.passes.store_fp16 import StoreFp16
from sdq_export.passes.store_integers import StoreIntegers
from sdq_export.source import Source
from sdq_export.storage import Storage, round_weights_

__all__ = ["component_names", "make_component"]


def component_names(source: Source, vae_encoder: bool) -> list[str]:
    """A package's components, in the order in which a prompt passes through them."""
    texts = [encoder.component for encoder in source.family.encoders]
    return [*texts, PROLOGUE, DENOISER, VAE_DECODER, *([VAE_ENCODER] if vae_encoder else [])]


def make_component(source: Source, export: ComponentExport, storage: Storage) -> tuple[ir.Model, nn.Module]:
    """A component's graph, and the torch module that it equals: its weights as they are stored."""
    module = export.module(_stored(source, export.part, storage))
    model = _captured(source, export, module, storage)
    stored: list[ir.passes.InPlacePass] = [StoreIntegers()] if storage.integers_of(export.part) is not None else []
    stored += [StoreFp16()] if storage.dtype == "fp16" else []
    run_passes(model, [NameNodes(), RemoveDeadCode(), FoldConstants(), *stored, ClearNotes()])
    return model, module


def _captured(source: Source, export: ComponentExport, module: nn.Module, storage: Storage) -> ir.Model:
    """A graph that holds its weights; not kept where they are large."""

    def make() -> ir.Model:
        return capture(module, export.inputs, batched=list(export.inputs), outputs=export.outputs, sized=export.sized)

    if source.files.weights_bytes(export.part) > KEPT_BYTES:
        return make()
    return capture_once(_key(source, export, storage), make)


def _key(source: Source, export: ComponentExport, storage: Storage) -> tuple[Hashable, ...]:
    """All that the graph depends on."""
    shapes = tuple((name, tuple(example.shape)) for name, example in export.inputs.items())
    # the rows of textual inversions are at the tokenizer's numbers
    told = () if export.tokenizer is None else (source.hashes[export.tokenizer], source.told)
    stored = storage.dtype, storage.integers_of(export.part)
    return source.hashes[export.part], export.name, export.outputs, shapes, export.sized, *stored, *told, *export.key


def _stored(source: Source, part: str, storage: Storage) -> nn.Module:
    stored: nn.Module = source.own(part)
    if storage.dtype == "fp16":
        round_weights_(stored)
    if (integers := storage.integers_of(part)) is not None:
        round_to_integers_(stored, component_layers(stored), integers)
    return stored
