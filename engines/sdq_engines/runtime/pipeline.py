"""A package as a pipeline: prompts and seeds in, images out.

pipe = Pipeline.load("package", engine="auto")
result = pipe("a red circle on a blue background", seed=7)
result.images[0].save("image.png")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from sdq_engines.arguments import as_choice, as_folder, as_function, as_whole
from sdq_engines.backends.base import Arrays, Session
from sdq_engines.backends.registry import AUTO, check_engine_name
from sdq_engines.guidance import Guidance
from sdq_engines.package.held import while_unchanged
from sdq_engines.package.layout import PROLOGUE, SAMPLER, VAE_DECODER
from sdq_engines.package.schema import Size
from sdq_engines.package.store import Package, Verify, open_package
from sdq_engines.runtime.beginning import (
    Beginning,
    begin_from_noise,
    begin_from_originals,
    first_call,
)
from sdq_engines.runtime.interface import check_interface
from sdq_engines.runtime.loop import LoopTime, StepEvent, denoise
from sdq_engines.runtime.noise import NoiseStream
from sdq_engines.runtime.opening import open_engine
from sdq_engines.runtime.originals import ImageEncoder
from sdq_engines.runtime.output import PipelineOutput, as_images
from sdq_engines.runtime.pictures import Pictured
from sdq_engines.runtime.prompts import ImageSize, PromptEncoder
from sdq_engines.runtime.requests import (
    ImageRequest,
    check_guidance,
    check_originals,
    check_sampler,
    check_size,
    plan_images,
    refuse_others,
)
from sdq_engines.runtime.sampler import SamplerTables
from sdq_engines.runtime.wording import Wording, negative_wordings, prompt_wordings
from sdq_engines.sizes import requested_size

__all__ = ["Pipeline", "PipelineOutput"]

Begin = Callable[[Sequence[ImageRequest], Sequence[NoiseStream]], Beginning]
"""Where the run of one batch begins."""


class Pipeline:
    """A loaded package on one engine. Make it by `Pipeline.load`.

    It may be called from any number of threads: each call makes the images that it would make alone. The memory is that
    of one call, since onnxruntime runs calls side by side as far as the cores go, openvino takes turns call by call of
    the network, and TensorRT makes one batch after the other. What it loaded stays as it was when others change the
    package.

    Raises:
        SdqError: the manifest contradicts the graphs.
    """

    def __init__(self, package: Package, session: Session) -> None:
        self.package, self.session = package, session
        self.manifest = package.manifest
        self.prompts = PromptEncoder(package, session)
        self._tables = SamplerTables.load(package.path(SAMPLER), package.manifest.sampler)
        self._encoder = ImageEncoder(package, session)
        check_interface(package, session)

    @classmethod
    def load(cls, folder: str | Path, engine: str = AUTO, verify: Verify = "full", **options: Any) -> Pipeline:
        """Check a package and load one of its engines.

        Args:
            folder: the package.
            engine: its name, or "auto" for the fastest of the package's engines that works here.
            verify: "full" hashes every file; "cached" those that changed since the last full check.
            options: of the backend: `providers`, `threads` (onnxruntime); `threads` (openvino).

        Raises:
            SdqError: see `open_package`; the engine is missing, or was built for another version or device; it does not
                take an option; the manifest contradicts the graphs.
        """
        root = as_folder(folder, "folder")
        check_engine_name(engine)
        return while_unchanged(root, lambda: cls.from_package(open_package(root, verify), engine, **options))

    @classmethod
    def from_package(cls, package: Package, engine: str = AUTO, **options: Any) -> Pipeline:
        """Load an engine of a package that has been checked."""
        return cls(package, open_engine(package, engine, options))

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
        image: Pictured | Sequence[Pictured] | None = None,
        mask_image: Pictured | Sequence[Pictured] | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        prompt_weighting: str | bool | None = None,
        callback: Callable[[StepEvent], None] | None = None,
        **others: Any,
    ) -> PipelineOutput:
        """Make images.

        Numbers and texts may be Python's or numpy's; a seed may also be 7.0 or "7". What could mean several things is
        refused.

        Args:
            prompt: one or many.
            negative_prompt: none, one for all, or one per prompt.
            seed: image i of the call starts from `seed + i`, or from the i-th of a list; by default random.
            guidance_scale: of classifier-free guidance; by default the package's; 1 or less is none, as in diffusers.
            num_images_per_prompt: images of each prompt.
            image: what to start from instead of noise, one for all or one per prompt: a PIL image, an array [H, W, 3]
                of uint8, or a file's path; resized to the package's size, with a warning, where it has another.
            mask_image: paints only where this is white, keeps the rest of `image`; an array is [H, W] of uint8 or bool.
            strength: how much of `image` to repaint, above 0 to 1; by default what diffusers' pipeline
                of the same family takes (`manifest.defaults`).
            height, width: in pixels, within what the engine was built for; by default the package's own.
            num_inference_steps, scheduler: the package's, or nothing.
            original_size, crops_coords_top_left, target_size: what Stable Diffusion XL is told of the image's origin,
                (height, width) in pixels; by default an uncropped image of the size that is made.
            prompt_2, prompt_3: what the second and third text encoder read in place of `prompt`, for a model that has
                them; one for all prompts or one each.
            negative_prompt_2, negative_prompt_3: likewise, in place of `negative_prompt`.
            prompt_weighting: "a1111" (or True) reads the weights in prompts, `(word:1.2)`, as AUTOMATIC1111's web UI
                does (docs/prompts.md); by default a prompt is taken literally.
            callback: hears a `StepEvent` after each step.
            others: arguments of diffusers' pipelines; each is refused with the reason.

        Raises:
            SdqError: an argument that this package cannot honour.
        """
        refuse_others(self.manifest, others)
        callback = as_function(callback, "callback")
        check_sampler(self.manifest, num_inference_steps, scheduler)
        weighted = as_choice(prompt_weighting, "prompt_weighting", "a1111") is not None
        prompts = prompt_wordings(
            prompt, {"prompt_2": prompt_2, "prompt_3": prompt_3}, self.prompts.components, weighted
        )
        negatives = negative_wordings(
            negative_prompt,
            {"negative_prompt_2": negative_prompt_2, "negative_prompt_3": negative_prompt_3},
            self.prompts.components,
            len(prompts),
            weighted,
            self.manifest.io.force_zeros_for_empty_prompt,
        )
        requests = plan_images(prompts, negatives, seed, num_images_per_prompt)
        height, width = (None if n is None else as_whole(n, name) for n, name in ((height, "height"), (width, "width")))
        size = requested_size(self.package, self.engine, self.session.entry.profile, height, width)
        strength = check_originals(self.manifest, image, mask_image, strength)
        begin = (
            self._from_noise(size)
            if strength is None
            else self._from_originals(image, mask_image, strength, len(prompts), size)
        )
        guidance = check_guidance(self.manifest, guidance_scale)
        told = check_size(self.prompts.takes_size, size, original_size, crops_coords_top_left, target_size)
        self.prompts.check([request.text(row) for row in guidance.texts for request in requests])
        texts: dict[Wording, Arrays] = {}
        latents, images, loops = [], [], []
        most = self.session.entry.profile.batch_max
        for start in range(0, len(requests), most):
            batch = range(start, min(start + most, len(requests)))
            chosen = [requests[i] for i in batch]
            self._condition(texts, chosen, guidance, told)
            made, spent = self._denoise(chosen, batch, guidance, texts, begin, callback)
            images += as_images(self.decode(made), self.engine)
            latents.append(made)
            loops.append(spent)
        return PipelineOutput(images, np.concatenate(latents), [request.seed for request in requests], loops)

    def _condition(
        self, texts: dict[Wording, Arrays], requests: Sequence[ImageRequest], guidance: Guidance, size: ImageSize
    ) -> None:
        """Leave in `texts` the prologue's outputs of every different text of one batch, [1, ...] each.

        Those of the batch before that are needed again stay, the others go: of a large model they are tens of
        megabytes a text, and a call may have any number of texts.
        """
        wanted = dict.fromkeys(request.text(row) for row in guidance.texts for request in requests)
        for text in [text for text in texts if text not in wanted]:
            del texts[text]
        for text in [text for text in wanted if text not in texts]:
            texts[text] = self.prologue(self.prompts.encode([text], size))

    def prologue(self, inputs: Arrays) -> Arrays:
        """What the denoiser needs of the prompts, [n, ...] by name, from what `prompts.encode` gives."""
        wanted = {name: inputs[name] for name in self.manifest.io.prologue_inputs}
        return self.session.component(PROLOGUE).run(wanted)

    def _denoise(
        self,
        requests: Sequence[ImageRequest],
        batch: range,
        guidance: Guidance,
        texts: Mapping[Wording, Arrays],
        begin: Begin,
        callback: Callable[[StepEvent], None] | None,
    ) -> tuple[np.ndarray, LoopTime]:
        streams = [NoiseStream(request.seed) for request in requests]
        beginning = begin(requests, streams)
        # The graph has two halves; without guidance both are the prompt's: uncond + 1 * (cond - uncond) = cond.
        halves = guidance.texts if guidance.rows == 2 else guidance.texts * 2
        order = [request.text(row) for row in halves for request in requests]
        prompt = {
            name: np.concatenate([texts[text][name] for text in order]) for name in self.manifest.io.prologue_outputs
        }
        rows = self._tables.coefficients[beginning.call]
        drawn = streams if self.manifest.sampler.stochastic else None
        shape = beginning.latents.shape[1:]
        given = {**prompt, **beginning.extra}
        with closing(self.session.stepper(beginning.latents, guidance.scale, rows, given)) as stepper:
            return denoise(stepper, len(rows), shape, batch, drawn, callback, beginning.call, beginning.blend)

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """(C, h, w) of images of this size, (height, width); by default of the size that a plain call makes."""
        size = size or requested_size(self.package, self.engine, self.session.entry.profile, None, None)
        channels, height, _ = self.manifest.io.latent_shape
        factor = self.manifest.io.image_size[0] // height
        return channels, size[0] // factor, size[1] // factor

    def _from_noise(self, size: Size) -> Begin:
        """Without an image an inpainting denoiser paints the whole of a grey one."""
        grey = None
        if self.manifest.io.extra_channels:
            grey = self._encoder.encode(np.zeros((3, *size), np.float32)).mean
        return lambda _, streams: begin_from_noise(self._tables, streams, self.latent_shape(size), grey)

    def _from_originals(self, image: Any, mask_image: Any, strength: float, prompts: int, size: Size) -> Begin:
        """The images of the call are encoded before the first batch."""
        call = first_call(self.manifest.sampler, strength)
        originals = self._encoder.originals(image, mask_image, prompts, size)

        def begin(requests: Sequence[ImageRequest], streams: Sequence[NoiseStream]) -> Beginning:
            chosen = [originals[request.prompt_index] for request in requests]
            return begin_from_originals(self._tables, call, strength, chosen, streams)

        return begin

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images of latents [batch, C, h, w], FP32 [batch, 3, height, width] in [0, 1]."""
        return self.session.component(VAE_DECODER).run({"latents": latents})["images"].astype(np.float32)
