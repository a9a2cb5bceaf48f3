"""A package as a pipeline: prompts and seeds in, images out.

pipe = Pipeline.load("package", engine="auto")
result = pipe("a red circle on a blue background", seed=7)
result.images[0].save("image.png")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdq_engines.backends.base import Arrays, Session
from sdq_engines.backends.registry import AUTO, backend, check_engine_name, fastest
from sdq_engines.errors import SdqError
from sdq_engines.package.layout import PROLOGUE, SAMPLER, VAE_DECODER
from sdq_engines.package.store import Package, Verify, open_package
from sdq_engines.runtime.loop import LoopTime, StepEvent, denoise
from sdq_engines.runtime.noise import NoiseStream
from sdq_engines.runtime.prompts import ImageSize, PromptEncoder
from sdq_engines.runtime.requests import ImageRequest, check_sampler, check_size, plan_images, refuse_others
from sdq_engines.runtime.sampler import SamplerTables

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pipeline", "PipelineOutput"]


@dataclass(frozen=True)
class PipelineOutput:
    """What one call made."""

    images: list[Image]
    latents: np.ndarray
    """FP32 [images, C, h, w], as the sampler ended, before the decoder."""
    seeds: list[int]
    """Of each image; each can be made again alone by its own."""
    loops: list[LoopTime] = field(default_factory=list, repr=False)
    """Where the time of each batch's loop went."""


class Pipeline:
    """A loaded package on one engine. Make it by `Pipeline.load`."""

    def __init__(self, package: Package, session: Session) -> None:
        self.package, self.session = package, session
        self.manifest = package.manifest
        self.prompts = PromptEncoder(package, session)
        self._tables = SamplerTables.load(package.path(SAMPLER))

    @classmethod
    def load(cls, folder: str | Path, engine: str = AUTO, verify: Verify = "full", **options: Any) -> Pipeline:
        """Check a package and load one of its engines.

        Args:
            folder: the package.
            engine: its name, or "auto" for the fastest of the package's engines that works here.
            verify: "full" hashes every file; "cached" those that changed since the last full check.
            options: of the backend: `providers`, `threads` (onnxruntime); `threads` (openvino).

        Raises:
            SdqError: see `open_package`; or the engine is missing, or was built for another version or device.
        """
        check_engine_name(engine)
        return cls.from_package(open_package(folder, verify), engine, **options)

    @classmethod
    def from_package(cls, package: Package, engine: str = AUTO, **options: Any) -> Pipeline:
        """Load an engine of a package that has been checked."""
        if engine == AUTO:
            return cls(package, _load_fastest(package, options))
        return cls(package, backend(engine).load(package, package.engine(engine), options))

    @property
    def engine(self) -> str:
        """The engine in use."""
        return self.session.name

    @property
    def coefficients(self) -> np.ndarray:
        """The sampler's rows of a full run, FP32 [T, R]."""
        return self._tables.coefficients[0]

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        callback: Callable[[StepEvent], None] | None = None,
        **others: Any,
    ) -> PipelineOutput:
        """Make images.

        Args:
            prompt: one or many.
            negative_prompt: none, one for all, or one per prompt.
            seed: image i of the call starts from `seed + i`, or from the i-th of a list; by default random.
            guidance_scale: of classifier-free guidance; by default the package's; 1 or less is none, as in diffusers.
            num_images_per_prompt: images of each prompt.
            num_inference_steps, scheduler: the package's, or nothing.
            original_size, crops_coords_top_left, target_size: what Stable Diffusion XL is told of the image's origin,
                (height, width) in pixels; by default an uncropped image of the package's size.
            callback: hears a `StepEvent` after each step.
            others: arguments of diffusers' pipelines; each is refused with the reason.

        Raises:
            SdqError: an argument that this package cannot honour.
        """
        refuse_others(others)
        check_sampler(self.manifest, num_inference_steps, scheduler)
        requests = plan_images(prompt, negative_prompt, seed, num_images_per_prompt)
        guidance = self.manifest.sampler.guidance_scale if guidance_scale is None else float(guidance_scale)
        size = check_size(self.prompts.takes_size, original_size, crops_coords_top_left, target_size)
        prompts = self._conditioning(requests, guidance, size)
        latents, images, loops = [], [], []
        most = self.session.entry.profile.batch_max
        for start in range(0, len(requests), most):
            batch = range(start, min(start + most, len(requests)))
            made, spent = self._denoise([requests[i] for i in batch], batch, guidance, prompts, callback)
            images += self._decode(made)
            latents.append(made)
            loops.append(spent)
        return PipelineOutput(images, np.concatenate(latents), [request.seed for request in requests], loops)

    def _conditioning(
        self, requests: Sequence[ImageRequest], guidance: float, size: ImageSize
    ) -> Mapping[str | None, Arrays]:
        """The prologue's outputs of every different text of the call, [1, ...] each, computed once."""
        texts: dict[str | None, None] = dict.fromkeys(request.prompt for request in requests)
        if guidance > 1:
            texts |= dict.fromkeys(request.negative_prompt for request in requests)
        return {text: self.prologue(self.prompts.encode([text], size)) for text in texts}

    def prologue(self, inputs: Arrays) -> Arrays:
        """What the denoiser needs of the prompts, [n, ...] by name, from what `prompts.encode` gives."""
        wanted = {name: inputs[name] for name in self.manifest.io.prologue_inputs}
        return self.session.component(PROLOGUE).run(wanted)

    def _denoise(
        self,
        requests: Sequence[ImageRequest],
        batch: range,
        guidance: float,
        prompts: Mapping[str | None, Arrays],
        callback: Callable[[StepEvent], None] | None,
    ) -> tuple[np.ndarray, LoopTime]:
        shape = self.manifest.io.latent_shape
        streams = [NoiseStream(request.seed) for request in requests]
        noise = np.stack([stream.normal(shape) for stream in streams])
        # Without guidance both halves are the prompt's: uncond + 1 * (cond - uncond) = cond.
        first = [request.negative_prompt if guidance > 1 else request.prompt for request in requests]
        order: list[str | None] = [*first, *(request.prompt for request in requests)]
        prompt = {
            name: np.concatenate([prompts[text][name] for text in order]) for name in self.manifest.io.prologue_outputs
        }
        stepper = self.session.stepper(
            noise * self._tables.init_noise_sigma[0], max(guidance, 1.0), self.coefficients, prompt
        )
        drawn = streams if self.manifest.sampler.stochastic else None
        return denoise(stepper, len(self.coefficients), shape, batch, drawn, callback)

    def _decode(self, latents: np.ndarray) -> list[Image]:
        from PIL import Image as images

        pixels = self.decode(latents)
        # As diffusers: [0, 1] to 8 bits by rounding, channels last.
        bytes_ = (pixels.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        return [images.fromarray(image) for image in bytes_]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images of latents [batch, C, h, w], FP32 [batch, 3, height, width] in [0, 1]."""
        return self.session.component(VAE_DECODER).run({"latents": latents})["images"].astype(np.float32)


def _load_fastest(package: Package, options: dict[str, Any]) -> Session:
    """The first of the package's engines, in the order of `auto`, that works and fits this machine."""
    candidates = list(package.manifest.engines)
    if not candidates:
        raise SdqError(
            f"The package at {package.folder} has no engine.",
            f"Build one: sdq-deploy build {package.folder} --engine auto",
        )
    reasons = []
    while candidates:
        name, seen = fastest(candidates)
        reasons += [f"{engine}: {found.reason}" for engine, found in seen.items() if not found.works]
        if name is None:
            break
        try:
            return backend(name).load(package, package.engine(name), options)
        except SdqError as error:  # built for another version or device: the next one may fit
            reasons.append(f"{name}: {error.message}")
            candidates = [other for other in candidates if other not in seen]
    raise SdqError(
        f"No engine of the package at {package.folder} works here: " + "; ".join(reasons),
        f"Build one that does: sdq-deploy build {package.folder} --engine auto",
    )
