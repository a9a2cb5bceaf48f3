"""results.json: everything that an evaluation found, typed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "CandidateResult",
    "Comparison",
    "EvaluationResults",
    "Figure",
    "PromptInfo",
    "SamplerUsed",
    "StepError",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figure(_Strict):
    """One figure of one candidate."""

    value: float
    """The mean over images, or the Fréchet distance."""
    low: float | None = None
    """The 95 % interval over prompts; None where there is none."""
    high: float | None = None
    worst: float | None = None
    """The worst image's."""
    median: float | None = None


class StepError(_Strict):
    """||z - z_FP|| / ||z_FP|| of the latents that one step left, mean over the traced images, with its interval."""

    step: int
    value: float
    low: float
    high: float


class CandidateResult(_Strict):
    """One candidate, or the reference."""

    name: str
    kind: Literal["package", "run", "model"]
    path: str
    images_by: str
    precision: str
    num_bytes: int | None
    identity: str
    """Hash of what its images depend on."""
    figures: dict[str, Figure]
    """By the names of `sdq_deploy.evaluation.catalogue`."""
    identical: float | None = None
    """Share of images equal to the reference's to the last bit."""
    latent_errors: list[StepError] = []


class Comparison(_Strict):
    """The paired difference `first` - `second` of one figure, image by image."""

    figure: str
    first: str
    second: str
    value: float
    low: float
    high: float


class SamplerUsed(_Strict):
    """What every image was made with."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float


class PromptInfo(_Strict):
    """The prompt set; figures of two evaluations with one hash were taken on the same prompts and seeds."""

    title: str
    count: int
    sha256: str
    traced: int
    """How many, from the first, had their latents compared at every step."""


class EvaluationResults(_Strict):
    """Everything in results.json."""

    kind: Literal["sdq-evaluation-results"] = "sdq-evaluation-results"
    schema_version: int = 1
    prompts: PromptInfo
    sampler: SamplerUsed
    reference: CandidateResult
    candidates: list[CandidateResult]
    comparisons: list[Comparison]
    skipped: list[str]
    """A sentence for each figure that could not be taken."""
    notes: list[str]
    """What a reader of the figures should know."""
    confidence: float
    seconds: float
    tools: dict[str, str]
