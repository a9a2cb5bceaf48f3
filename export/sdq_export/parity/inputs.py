"""What every criterion of the denoiser is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sdq_export.parity.budget import Gate
from sdq_export.parity.graphs import GraphFile, GraphRunner
from sdq_export.parity.samples import TeacherSamples
from sdq_export.sampler.plan import SamplerPlan

__all__ = ["DenoiserFiles", "OnStep", "ParityInputs"]

OnStep = Callable[[int, int], None]
"""Hears how many steps are done, and of how many."""


@dataclass(frozen=True)
class DenoiserFiles:
    """The canonical graphs on disk."""

    denoiser: GraphFile
    prologue: GraphFile


@dataclass(frozen=True)
class ParityInputs:
    """Where parity looks.

    Attributes:
        plan: the sampler.
        samples: the teacher's inputs and answers.
        gate: the steps.
        device: where graphs run: "cpu" or "cuda".
    """

    plan: SamplerPlan
    samples: TeacherSamples
    gate: Gate
    device: str = "cpu"

    def runner(self, denoiser: GraphFile, prologue: GraphFile) -> GraphRunner:
        """The denoiser's graphs, opened for the samples' prompts."""
        samples = self.samples
        return GraphRunner(denoiser, prologue, self.plan, samples.conditioning, samples.extra, self.device)
