"""Parity of graphs whose size is free: at another size than the package's own they must be the same model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdq_export.parity.distances import relative
from sdq_export.parity.float_graph import FLOAT_LIMIT
from sdq_export.parity.graphs import GraphRunner, without_activations
from sdq_export.parity.inputs import DenoiserFiles
from sdq_export.parity.report import Criterion
from sdq_export.parity.samples import TeacherSamples
from sdq_export.reference import Reference
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.scratch import temporary_folder
from sdq_export.source import Source

__all__ = ["OtherSize", "renamed"]

_SEED = 31


class OtherSize:
    """Latents that are lower and wider; where the package's own size is the largest that there is, lower and narrower.

    Args:
        source: the checkpoint, for the sizes that its denoiser takes.
        samples: prompts and guidance.

    Attributes:
        latents: float32 [N, C, h, w].
    """

    def __init__(self, source: Source, samples: TeacherSamples) -> None:
        unit = source.family.latent_multiple
        limit = source.family.latent_limit
        count, channels, height, width = samples.shape
        size = (max(height - unit, unit), width + unit)
        if limit is not None and size[1] > limit:
            size = (max(height - 2 * unit, unit), max(width - unit, unit))
        generator = torch.Generator().manual_seed(_SEED)
        self.samples, self.latents = samples, torch.randn(count, channels, *size, generator=generator)
        self._extra = None
        if samples.extra is not None:
            self._extra = torch.randn(count, samples.extra.shape[1], *size, generator=generator)

    def answer(self, reference: Reference, step: int) -> Tensor:
        """The reference's guided output there, without activation quantization."""
        with reference.quantizers_off():
            return self.samples.guided(reference, self._extra)(self.latents, step)

    def check(self, files: DenoiserFiles, plan: SamplerPlan, step: int, wanted: Tensor, device: str) -> Criterion:
        """The denoiser's graph, activation quantization bypassed, against what `answer` said."""
        with temporary_folder() as folder:
            bypassed = without_activations(files.denoiser, Path(folder))
            runner = GraphRunner(bypassed, files.prologue, plan, self.samples.conditioning, self._extra, device)
            found = runner.output(self.latents, step, self.samples.guidance.scale)
            del runner
        height, width = self.latents.shape[2:]
        return Criterion(
            name="float_graph_other_size",
            says=f"relative distance from torch at {width}x{height} latents, without activation quantization,",
            limit=FLOAT_LIMIT,
            steps=(step,),
            per_step=(relative(found, wanted.numpy()),),
        )


def renamed(criterion: Criterion) -> Criterion:
    """A component's criterion as that of the other size."""
    return criterion.model_copy(
        update={"name": f"{criterion.name}_other_size", "says": f"{criterion.says}, at another size,"}
    )
