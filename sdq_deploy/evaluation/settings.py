"""What one evaluation does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdq_deploy.evaluation.candidates import Candidate
from sdq_deploy.evaluation.prompts import PromptSet
from sdq_deploy.evaluation.store import ImageStore
from sdq_export.checkpoint import SamplerSettings

__all__ = ["EvaluationSettings"]


@dataclass(frozen=True)
class EvaluationSettings:
    """One `sdq-deploy evaluate`, resolved.

    Attributes:
        out: the claimed output folder.
        candidates, reference, sampler: what is compared, with what, and how images are made.
        prompts: what is drawn.
        real: a folder of real images for the Fréchet distances; None for none.
        lpips, inception, clip: local weights of the metrics that need them; None skips the metric.
        batch_size: images made, and scored, together.
        processes: that make images at once.
        traced: images whose latents are compared at every step.
        device: of torch.
    """

    out: Path
    candidates: tuple[Candidate, ...]
    reference: Candidate
    sampler: SamplerSettings
    prompts: PromptSet
    real: Path | None = None
    lpips: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    batch_size: int = 8
    processes: int = 1
    traced: int = 256
    device: str = "cpu"

    @property
    def images(self) -> Path:
        """Where the images go."""
        return self.out / "images"

    def store(self, candidate: Candidate) -> ImageStore:
        """A candidate's images."""
        return ImageStore(self.images, candidate.name)
