"""The one sampler that all images of an evaluation are made with."""

from __future__ import annotations

from collections.abc import Sequence

from sdq_deploy.evaluation.candidates import Candidate
from sdq_engines.arguments import as_number
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import SamplerSettings
from sdq_export.source import load_source

__all__ = ["agree_on_sampler"]


def agree_on_sampler(
    candidates: Sequence[Candidate],
    reference: Candidate,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> SamplerSettings:
    """The sampler that all images are made with: the packages' and runs', which must be one.

    Args:
        candidates: those compared.
        reference: whose scheduler counts where there are models alone.
        scheduler, num_inference_steps: for models alone; beside a package or run they may only repeat its own.
        guidance_scale: replaces the candidates' own.

    Raises:
        SdqError: they differ, with what differs; a guidance that is not finite in FP32.
    """
    if guidance_scale is not None:
        guidance_scale = as_number(guidance_scale, "--guidance-scale")
    own = [candidate for candidate in candidates if candidate.sampler is not None]
    if not own:
        return _model_sampler(reference, scheduler, num_inference_steps, guidance_scale)
    first, chosen = own[0], own[0].sampler
    assert chosen is not None
    if guidance_scale is not None:
        chosen = chosen.model_copy(update={"guidance_scale": guidance_scale})
    for other in own[1:]:
        settings = other.sampler
        assert settings is not None
        if guidance_scale is not None:
            settings = settings.model_copy(update={"guidance_scale": guidance_scale})
        if difference := _difference(chosen, settings):
            raise SdqError(
                f"{first.name} and {other.name} do not sample alike: {difference}.",
                "Evaluate them apart, or export them with one sampler.",
            )
    _refuse_other_sampler(first, scheduler, num_inference_steps)
    return chosen


def _difference(a: SamplerSettings, b: SamplerSettings) -> str | None:
    for what in ("scheduler", "num_inference_steps", "guidance_scale"):
        if getattr(a, what) != getattr(b, what):
            return f"{what} {getattr(a, what)} and {getattr(b, what)}"
    # A newer diffusers writes more settings, so only those that both have are compared.
    for key in a.config.keys() & b.config.keys():
        if a.config[key] != b.config[key]:
            return f"{key} {a.config[key]} and {b.config[key]}"
    return None


def _refuse_other_sampler(first: Candidate, scheduler: str | None, steps: int | None) -> None:
    from sdq_export.sampler import make_scheduler

    settings = first.sampler
    assert settings is not None
    asked = type(make_scheduler(scheduler, {})).__name__ if scheduler is not None else settings.scheduler
    if asked != settings.scheduler or steps not in (None, settings.num_inference_steps):
        raise SdqError(
            f"{first.name} samples with {settings.scheduler} and {settings.num_inference_steps} steps and no other.",
            "Leave --scheduler and --num-inference-steps out; they are for models alone.",
        )


def _model_sampler(
    reference: Candidate, scheduler: str | None, steps: int | None, guidance_scale: float | None
) -> SamplerSettings:
    from sdq_export.sampler import compile_sampler

    source = load_source(reference.model_folder)
    plan = compile_sampler(source.scheduler_named(scheduler), source.family.default_steps if steps is None else steps)
    return SamplerSettings(
        scheduler=plan.scheduler,
        config=plan.config,
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=source.family.guidance if guidance_scale is None else guidance_scale,
    )
