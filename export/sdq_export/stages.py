"""The stages of an export, each with its part of the model: made, written, compared with torch, and let go of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from sdq_engines.guidance import Guidance
from sdq_engines.memory import give_back_memory
from sdq_engines.package.layout import DENOISER, PROLOGUE
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.components import make_component
from sdq_export.conditioning import Conditioning
from sdq_export.denoiser_export import make_denoiser, make_reference
from sdq_export.families.component import ComponentExport
from sdq_export.output import stage_component
from sdq_export.parity.budget import Gate
from sdq_export.parity.components import check_component, component_outputs
from sdq_export.parity.float_graph import check_float_graph
from sdq_export.parity.graphs import GraphFile
from sdq_export.parity.inputs import DenoiserFiles, ParityInputs
from sdq_export.parity.other_size import OtherSize, renamed
from sdq_export.parity.prologue import round_prologue_
from sdq_export.parity.quantized_graph import check_quantized_graph
from sdq_export.parity.reference import reference_outputs
from sdq_export.parity.report import Criterion, ParityReport
from sdq_export.parity.rounded import check_rounding
from sdq_export.parity.samples import TeacherSamples, parity_prompts, record_teacher
from sdq_export.parity.sites import check_sites
from sdq_export.reference import Reference
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
        conditioning = family.encode_prompts(parity_prompts(self.settings.prompts, self.gate.samples))
        for encoder in family.text_encoders:
            tokens = encoder.token_ids(["", *self.settings.prompts])
            self._component(encoder.export(), [tokens], tokens)
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
        free, latents = self.settings.dynamic_size, [samples.last]
        if free:
            latents.append(OtherSize(self.source, samples).latents[:1])
        drawn = self._component(self.source.family.vae_decoder(free), latents, latents[0])
        if self.settings.vae_encoder:
            images = [2 * each - 1 for each in drawn]
            self._component(self.source.family.vae_encoder(free), images, latents[0])
        self._release("vae")

    def _component(self, export: ComponentExport, given: Sequence[Tensor], rounded_on: Tensor) -> list[Tensor]:
        """Make a component's graph and compare it with torch.

        Args:
            export: which one.
            given: its input; a second one is of another size.
            rounded_on: what the cost of integer weights is measured on.

        Returns:
            Torch's first output of each input.
        """
        self.on_stage(f"capturing the {export.words.replace('vae', 'VAE')}", 0, 0)
        graph, module = make_component(self.source, export, self.settings.storage)
        file = self._written(export.name, graph)
        del graph
        wanted = [component_outputs(module, each) for each in given]
        found = [check_component(file, export, *each) for each in zip(given, wanted, strict=True)]
        self.criteria.extend([found[0], *map(renamed, found[1:])])
        if (integers := self.settings.storage.integers_of(export.part)) is not None:
            self.criteria.append(check_rounding(self.source, export, module, rounded_on, integers))
        return [first for first, *_ in wanted]

    def denoiser(self, samples: TeacherSamples) -> list[Criterion]:
        """Make the denoiser's graphs and hold them to criteria 1 to 3.

        The reference answers first and is let go of before the graphs are opened: a large network is in memory once.
        """
        self.on_stage("capturing the denoiser", 0, 0)
        inputs = ParityInputs(self.plan, samples, self.gate, self.device)
        other = OtherSize(self.source, samples) if self.settings.dynamic_size else None
        middle, quantized = self.plan.calls // 2, self.checkpoint is not None
        reference, files = self._denoiser_files(inputs)
        give_back_memory()
        reference.to(self.device)
        steps = len(self.gate.steps)
        counted = self._counted("parity, the reference", 2 * steps if quantized else steps)
        expected = reference_outputs(reference, inputs, quantized, counted)
        sites: list[Criterion] = []
        if self.checkpoint is not None:
            counted = self._counted("parity, sites", len(self.gate.site_steps))
            sites = check_sites(inputs, files, reference, self.checkpoint, counted)
        elsewhere = other.answer(reference, middle) if other is not None else None
        del reference
        self._release(self.source.family.denoiser)
        counted = self._counted("parity, float graph", steps)
        found = [check_float_graph(inputs, files, expected.floating, quantized, counted), *sites]
        if quantized:
            counted = self._counted("parity, quantized graph", steps)
            found.append(check_quantized_graph(inputs, files, expected.quantized, counted))
        if other is not None and elsewhere is not None:
            self.on_stage("parity, another size", 0, 0)
            self.criteria.append(other.check(files, self.plan, middle, elsewhere, self.device))
        give_back_memory()
        return found

    def _denoiser_files(self, inputs: ParityInputs) -> tuple[Reference, DenoiserFiles]:
        """The reference, and the graphs that must equal it."""
        settings = self.settings
        reference = make_reference(self.source, self.plan, self.checkpoint, settings.dtype)
        integer_layers = list[str]()
        if (integers := settings.prologue) is not None:
            self.on_stage(f"parity, {integers.upper()} prologue", 0, 0)
            integer_layers, criterion = round_prologue_(reference, inputs, integers)
            self.criteria.append(criterion)
        graphs = make_denoiser(
            self.source, self.plan, reference, self.checkpoint, settings.dtype, settings.dynamic_size, integer_layers
        )
        files = DenoiserFiles(self._written(DENOISER, graphs.denoiser), self._written(PROLOGUE, graphs.prologue))
        return reference, files

    def _counted(self, name: str, total: int) -> Callable[[int, int], None]:
        """A stage that is counted; it begins now."""
        self.on_stage(name, 0, total)
        return lambda done, total: self.on_stage(name, done, total)

    def _written(self, component: str, graph: ir.Model) -> GraphFile:
        return stage_component(self.staging, component, graph)

    def _release(self, part: str) -> None:
        self.source.release(part)
        give_back_memory()
