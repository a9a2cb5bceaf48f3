"""What all stages of one training share: settings, the loaded source, the teacher, the sampler, the devices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdq_deploy.lora import Lora
from sdq_deploy.recipes.schema import Recipe
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.method import TrainingMethod
from sdq_deploy.training.prompts import PromptSplit, split_prompts
from sdq_deploy.training.registry import method_named
from sdq_deploy.training.teacher import make_teacher
from sdq_export.checkpoint import SamplerSettings, SourceRef
from sdq_export.embeddings import Embedding
from sdq_export.quantspec import QuantSpec
from sdq_export.sampler import SamplerPlan, compile_sampler
from sdq_export.single_file import FromFile
from sdq_export.sites import find_sites
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser
from sdq_export.text_settings import TextSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress

__all__ = ["TrainingContext", "TrainingSettings"]


@dataclass(frozen=True)
class TrainingSettings:
    """One `sdq-deploy train`, resolved."""

    model: str
    """What the user named: a folder, a hub id, or shapes-64."""
    out: Path
    recipe: Recipe
    prompts: tuple[str, ...]
    seed: int = 0
    revision: str | None = None
    embeddings: tuple[Embedding, ...] = ()
    """Textual inversions that prompts name."""
    loras: tuple[Lora, ...] = ()
    """Adapters to fuse into the model first."""
    from_file: FromFile = field(default_factory=FromFile)
    """How a model that is a single file is converted."""
    recipe_tree: Mapping[str, Any] = field(default_factory=dict)
    """What `recipe` was resolved from, the tables of all precisions with it: recorded, so that a resumed run can change
    its precision. Empty: `recipe` alone is recorded."""


class TrainingContext:
    """Shared by the stages of one training.

    Args:
        settings: what to do.
        source: the checkpoint to quantize.
        accelerator: devices, processes and mixed precision.
        progress: a started progress display; shown by the main process only.
    """

    def __init__(
        self, settings: TrainingSettings, source: Source, accelerator: Accelerator, progress: Progress
    ) -> None:
        self.settings, self.accelerator, self.progress = settings, accelerator, progress
        self.recipe, self.seed = settings.recipe, settings.seed
        source = source.with_text(self.text, settings.embeddings)
        self.source = source.with_split_shortcuts() if self.recipe.quantization.split_shortcuts else source
        self.folder = RunFolder(settings.out)

    @property
    def text(self) -> TextSettings:
        """How prompts are read, as the quantized checkpoint records it."""
        return TextSettings(**self.recipe.text.model_dump())

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @cached_property
    def prompts(self) -> PromptSplit:
        """Training and held-out prompts."""
        collect = self.recipe.collect
        return split_prompts(list(self.settings.prompts), collect.num_prompts, collect.validation_prompts)

    @cached_property
    def plan(self) -> SamplerPlan:
        """The recipe's sampler, compiled."""
        name = self.recipe.sampling.scheduler
        scheduler = self.source.scheduler_named(None if name == "default" else name)
        return compile_sampler(scheduler, self.recipe.sampling.num_inference_steps)

    @cached_property
    def timesteps(self) -> Tensor:
        """[T], what the model is told at each step."""
        return torch.from_numpy(self.plan.timesteps)

    @cached_property
    def teacher(self) -> StepDenoiser:
        """The floating-point denoiser by step, on the device, without gradients."""
        return make_teacher(self.source.denoiser, self.timesteps, self.device)

    def release_teacher(self) -> None:
        """Give the teacher's memory back; it is made again when it is asked for."""
        self.__dict__.pop("teacher", None)

    @cached_property
    def spec(self) -> QuantSpec:
        """The sites."""
        wanted = self.recipe.quantization
        return find_sites(
            self.source.denoiser,
            self.plan.calls,
            wanted.precision,
            keep=wanted.keep,
            bits=wanted.bits,
            groups=self.method.groups(self.recipe) or None,
            block_size=wanted.block_size,
        )

    @property
    def method(self) -> TrainingMethod[TrainingContext]:
        """The recipe's method."""
        return method_named(self.recipe.method)

    @property
    def smoothing(self) -> tuple[float, ...]:
        """Strengths to try."""
        return self.recipe.calibrate.smoothing if self.method.smooths(self.recipe) else ()

    @cached_property
    def sampler_settings(self) -> SamplerSettings:
        """The sampler as the quantized checkpoint records it."""
        sampling = self.recipe.sampling
        return SamplerSettings(
            scheduler=self.plan.scheduler,
            config=self.plan.config,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )

    @cached_property
    def source_ref(self) -> SourceRef:
        """The source as the quantized checkpoint records it."""
        model = str(self.folder.model.resolve()) if self.folder.prepared.is_file() else self.settings.model
        source = self.source
        return SourceRef(model=model, revision=source.revision, sha256=source.sha256, parts=source.hashes)

    @cached_property
    def prompt_hash(self) -> str:
        """Identifies the prompts of this run."""
        joined = "\n".join((*self.prompts.training, "", *self.prompts.validation))
        return hashlib.sha256(joined.encode()).hexdigest()

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """A progress bar for the length of the block; yields `advance(count=1)`."""
        task = self.progress.add_task(description, total=total, completed=done)

        def advance(count: int = 1) -> None:
            self.progress.advance(task, count)

        yield advance
        self.progress.refresh()
