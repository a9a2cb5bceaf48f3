"""What makes a candidate's images: the torch-free runtime for packages, the torch reference for runs and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_deploy.evaluation.candidates import Candidate
from sdq_deploy.evaluation.generate import decode, sample_latents
from sdq_engines.guidance import Guidance
from sdq_engines.runtime.loop import StepEvent
from sdq_engines.runtime.pipeline import Pipeline
from sdq_export.checkpoint import SamplerSettings, load_checkpoint
from sdq_export.reference import build_reference
from sdq_export.sampler import SamplerPlan
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser
from sdq_export.text_settings import TextSettings

__all__ = ["ImageBatch", "Maker", "load_maker"]

_THREADED_ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class ImageBatch:
    """Images made together.

    Attributes:
        images: uint8 [N, H, W, 3].
        latents: FP32 [N, T, C, h, w], as each step left them.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]


#: Called with N prompts and N seeds.
Maker = Callable[[Sequence[str], Sequence[int]], ImageBatch]


def load_maker(
    candidate: Candidate, sampler: SamplerSettings, device: str = "cpu", threads: int | None = None
) -> Maker:
    """Load what a candidate needs to make images.

    Args:
        candidate: a package, run or model.
        sampler: what all candidates agreed on.
        device: of torch; a package's engine has its own.
        threads: of a package's CPU engine; None leaves it to the engine.
    """
    if candidate.kind == "package":
        options = {"threads": threads} if threads and candidate.engine in _THREADED_ENGINES else {}
        # The package was hashed when the evaluation opened it.
        pipeline = Pipeline.load(candidate.path, engine=str(candidate.engine), verify="cached", **options)
        return PackageMaker(pipeline, sampler.guidance_scale)
    plan = sampler.compile()
    timesteps = torch.from_numpy(plan.timesteps)
    if candidate.kind == "run":
        checkpoint = load_checkpoint(candidate.path)
        source = load_source(candidate.model_folder).with_text(checkpoint.info.text, checkpoint.embeddings)
        denoiser: nn.Module = build_reference(
            source.for_spec(checkpoint.spec).own(source.family.denoiser), checkpoint.spec, checkpoint.tensors, timesteps
        )
    else:
        source = load_source(candidate.model_folder).with_text(candidate.text or TextSettings())
        denoiser = StepDenoiser(source.own(source.family.denoiser), timesteps).eval().requires_grad_(False)
    return TorchMaker(source, denoiser, plan, sampler.guidance_scale, device)


class TorchMaker:
    """Images by a denoiser in torch; see `Maker`.

    Args:
        source: brings text encoders and VAE; its VAE is moved to the device.
        denoiser: takes (latents, steps, conditioning); it is moved to the device.
        plan: the sampler.
        guidance_scale: of classifier-free guidance.
        device: where to compute.
    """

    def __init__(
        self, source: Source, denoiser: nn.Module, plan: SamplerPlan, guidance_scale: float, device: str = "cpu"
    ) -> None:
        self.source, self.plan, self.guidance_scale, self.device = source, plan, guidance_scale, device
        self.denoiser = denoiser.to(device)
        # The reference keeps its quantizers beside the module, not in it.
        for quantizer in getattr(denoiser, "quantizers", {}).values():
            quantizer.to(device)
        source.vae.to(device)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> ImageBatch:
        kept: list[NDArray[np.float32]] = []

        def keep(step: int, latents: Tensor) -> None:
            kept.append(latents.cpu().numpy())

        final = sample_latents(
            self.source,
            self.denoiser,
            self.plan,
            prompts,
            seeds,
            Guidance.classifier_free(self.guidance_scale),
            device=self.device,
            on_latents=keep,
        )
        return ImageBatch(decode(self.source, final), np.stack(kept, axis=1))


class PackageMaker:
    """Images by the runtime that a user runs; see `Maker`."""

    def __init__(self, pipeline: Pipeline, guidance_scale: float) -> None:
        self.pipeline, self.guidance_scale = pipeline, guidance_scale

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> ImageBatch:
        manifest = self.pipeline.manifest
        latents = np.empty((len(prompts), manifest.sampler.num_calls, *manifest.io.latent_shape), np.float32)

        def keep(event: StepEvent) -> None:
            latents[event.images.start : event.images.stop, event.step] = event.latents()

        made: Any = self.pipeline(list(prompts), seed=list(seeds), guidance_scale=self.guidance_scale, callback=keep)
        return ImageBatch(np.stack([np.asarray(image) for image in made.images]), latents)
