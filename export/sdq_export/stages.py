"""The stages of an export, each with its part of the model: made, written, compared with torch, and let go of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.guidance import Guidance
from sdq_engines.memory import give_back_memory
from sdq_engines.package.layout import DENOISER, PROLOGUE, VAE_DECODER, VAE_ENCODER
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.components import (
    make_denoiser,
    make_reference,
    make_text_encoder,
    make_vae_decoder,
    make_vae_encoder,
)
from sdq_export.conditioning import Conditioning
from sdq_export.output import stage_component
from sdq_export.parity.budget import Gate
from sdq_export.parity.components import check_text_encoder, check_vae_decoder, check_vae_encoder
from sdq_export.parity.gate import DenoiserFiles, check_float_graph, check_quantized_graph, check_sites
from sdq_export.parity.graphs import GraphFile
from sdq_export.parity.other_size import OtherSize, renamed
from sdq_export.parity.prologue import round_prologue_
from sdq_export.parity.reference import ReferenceOutputs, reference_outputs
from sdq_export.parity.report import Criterion, ParityReport
from sdq_export.parity.rounded import rounded_text_encoder, rounded_vae_decoder, rounded_vae_encoder
from sdq_export.parity.samples import TeacherSamples, parity_prompts, record_teacher
from sdq_export.reference import move_reference_
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.settings import PackageSettings
from sdq_export.source import Source

__all__ = ["ExportJob", "OnStage"]

OnStage = Callable[[str, int, int], None]
"""Hears a stage's name, how much of it is done, and of how much; 0 of 0 where there is nothing to count."""


@dataclass(frozen=True)
class ExportJob:
    """One export under way; its methods are its stages, in order.

    Attributes:
        source, plan, guidance_scale, checkpoint, settings: as of `export_package`.
        gate: what of the denoiser's run is looked at.
        device: where teacher, reference and, if ONNX Runtime can, the denoiser's graphs run: "cpu" or "cuda".
        staging: where graphs are written.
        on_stage: hears what is being done.
    """

    source: Source
    plan: SamplerPlan
    guidance_scale: float
    checkpoint: QuantizedCheckpoint | None
    settings: PackageSettings
    gate: Gate
    device: str
    staging: Path
    on_stage: OnStage
    criteria: list[Criterion] = field(default_factory=list)
    """What was measured so far of the components that are not quantized."""

    def run(self) -> tuple[ParityReport, TeacherSamples]:
        """All of it; the denoiser's criteria come first in the report."""
        samples = self.teacher(self.text())
        self.vae(samples)
        found = self.denoiser(samples)
        return ParityReport(criteria=(*found, *self.criteria)), samples

    def text(self) -> Conditioning:
        """Encode the prompts of parity, and make every text encoder's graph."""
        family = self.source.family
        self.on_stage("encoding the prompts", 0, 0)
        conditioning = family.encode_prompts(self.source, parity_prompts(self.settings.prompts, self.gate.samples))
        for encoder in family.text_encoders:
            self.on_stage(f"capturing the {encoder.component.replace('_', ' ')}", 0, 0)
            graph, module = make_text_encoder(self.source, encoder, self.settings.dtype, self.settings.text_encoder)
            file = self._written(encoder.component, graph)
            del graph
            self.criteria.append(check_text_encoder(file, module, self.source, encoder, self.settings.prompts))
            if (integers := self.settings.text_encoder) is not None:
                self.criteria.append(
                    rounded_text_encoder(module, self.source, encoder, self.settings.prompts, integers)
                )
            del module
            self._release(encoder.component)
        return conditioning

    def teacher(self, conditioning: Conditioning) -> TeacherSamples:
        """Sample with the floating-point model."""
        name, steps = "sampling with the floating-point model", len(self.gate.steps)
        self.on_stage(name, 0, steps)
        samples = record_teacher(
            self.source, self.plan, Guidance.classifier_free(self.guidance_scale), conditioning, self.gate, self.device,
            lambda done: self.on_stage(name, done, steps),
        )  # fmt: skip
        self._release(self.source.family.denoiser)
        return samples

    def vae(self, samples: TeacherSamples) -> None:
        """Make the VAE's graphs; what the decoder draws is what the encoder is compared on."""
        storage, latents = self.settings, [samples.last]
        if self.settings.dynamic_size:
            latents.append(OtherSize(self.source, samples).latents[:1])
        self.on_stage("capturing the VAE decoder", 0, 0)
        graph, decoder = make_vae_decoder(self.source, storage.dtype, self.settings.dynamic_size, storage.vae)
        file = self._written(VAE_DECODER, graph)
        del graph
        images = [_drawn(decoder, each) for each in latents]
        found = [check_vae_decoder(file, decoder, *each) for each in zip(latents, images, strict=True)]
        self.criteria.extend([found[0], *map(renamed, found[1:])])
        if storage.vae is not None:
            self.criteria.append(rounded_vae_decoder(decoder, self.source, latents[0], storage.vae))
        del decoder
        if self.settings.vae_encoder:
            self._vae_encoder(images, latents[0])
        self._release("vae")

    def _vae_encoder(self, images: Sequence[Tensor], latents: Tensor) -> None:
        storage = self.settings
        self.on_stage("capturing the VAE encoder", 0, 0)
        graph, encoder = make_vae_encoder(self.source, storage.dtype, self.settings.dynamic_size, storage.vae)
        file = self._written(VAE_ENCODER, graph)
        del graph
        found = [check_vae_encoder(file, encoder, each) for each in images]
        self.criteria.extend([found[0], *map(renamed, found[1:])])
        if storage.vae is not None:
            self.criteria.append(rounded_vae_encoder(encoder, self.source, latents, storage.vae))

    def denoiser(self, samples: TeacherSamples) -> list[Criterion]:
        """Make the denoiser's graphs and hold them to criteria 1 to 3.

        The reference answers first and is let go of before the graphs are opened: a large network is in memory once.
        """
        self.on_stage("capturing the denoiser", 0, 0)
        other = OtherSize(self.source, samples) if self.settings.dynamic_size else None
        middle, quantized = self.plan.calls // 2, self.checkpoint is not None
        reference, files = self._denoiser_files(samples)
        give_back_memory()
        move_reference_(reference, self.device)
        expected = self._expected(reference, samples)
        sites: list[Criterion] = []
        if self.checkpoint is not None:
            sites = check_sites(files, samples, reference, self.checkpoint, self.gate, self._counted("parity, sites"))
        elsewhere = other.answer(reference, middle) if other is not None else None
        del reference
        self._release(self.source.family.denoiser)
        names = "parity, float graph", "parity, quantized graph"
        rest = (self.plan, samples, expected, self.gate)
        self.on_stage(names[0], 0, len(self.gate.steps))
        found = [check_float_graph(files, *rest, quantized, self.device, self._counted(names[0])), *sites]
        if quantized:
            self.on_stage(names[1], 0, len(self.gate.steps))
            found.append(check_quantized_graph(files, *rest, self.device, self._counted(names[1])))
        if other is not None and elsewhere is not None:
            self.on_stage("parity, another size", 0, 0)
            self.criteria.append(other.check(files, self.plan, middle, elsewhere, self.device))
        give_back_memory()
        return found

    def _denoiser_files(self, samples: TeacherSamples) -> tuple[Any, DenoiserFiles]:
        """The reference, and the graphs that must equal it."""
        reference = make_reference(self.source, self.plan, self.checkpoint, self.settings.dtype)
        integer_layers = list[str]()
        if (integers := self.settings.prologue) is not None:
            self.on_stage(f"parity, {integers.upper()} prologue", 0, 0)
            integer_layers, criterion = round_prologue_(reference, samples, self.gate.site_steps, integers)
            self.criteria.append(criterion)
        graphs = make_denoiser(
            self.source,
            self.plan,
            reference,
            self.checkpoint,
            self.settings.dtype,
            self.settings.dynamic_size,
            integer_layers,
        )
        files = DenoiserFiles(self._written(DENOISER, graphs.denoiser), self._written(PROLOGUE, graphs.prologue))
        return reference, files

    def _expected(self, reference: Any, samples: TeacherSamples) -> ReferenceOutputs:
        counted = self._counted("parity, the reference")
        return reference_outputs(reference, samples, self.gate, self.checkpoint is not None, counted)

    def _counted(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_stage(name, done, total)

    def _written(self, component: str, graph: ir.Model) -> GraphFile:
        return stage_component(self.staging, component, graph)

    def _release(self, part: str) -> None:
        self.source.release(part)
        give_back_memory()


@torch.no_grad()
def _drawn(decoder: nn.Module, latents: Tensor) -> Tensor:
    images: Tensor = decoder(latents)
    return images
