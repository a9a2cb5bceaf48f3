"""What each iteration trains on: the three pipelines as sources of batches.

Batches are functions of (seed, iteration), cut into equal parts for the processes, so that several equal one and a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdq_deploy.recipes.schema import Pipeline
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData
from sdq_deploy.training.prompts import stable_seed
from sdq_engines.errors import SdqError
from sdq_export.conditioning import Conditioning
from sdq_export.guidance import ModelOutputs, combine

__all__ = ["Batch", "BatchSource", "make_source"]


@dataclass(frozen=True)
class Batch:
    """This process's part of one iteration's batch, on its device.

    Attributes:
        latents: f32 [B, C, h, w], the model's input.
        steps: int64 [B].
        conditioning: of B prompts.
        empty: of the empty prompt; None without guidance.
        target: the teacher's outputs where the dataset holds them.
    """

    latents: Tensor
    steps: Tensor
    conditioning: Conditioning
    empty: Conditioning | None
    target: ModelOutputs | None


class BatchSource(Protocol):
    """Gives the batch of an iteration, and hears what the student made of it."""

    def batch(self, iteration: int) -> Batch:
        """The part of this process."""

    def observe(self, iteration: int, outputs: ModelOutputs) -> None:
        """Take the student's outputs on the batch of this iteration."""

    def state(self) -> Tensor | None:
        """What a resume point has to keep, [B, ...] of this process; None where nothing."""

    def restore(self, state: Tensor) -> None:
        """Continue from what `state` gave."""


class _Source:
    """What the three pipelines share."""

    def __init__(self, context: TrainingContext, data: SerialData) -> None:
        total, processes = context.recipe.fit.batch_size, context.accelerator.num_processes
        if total % processes:
            raise SdqError(
                f"A batch of {total} cannot be cut into equal parts for {processes} processes.",
                f"Set a multiple of {processes}: --set fit.batch_size={total // processes * processes or processes}",
            )
        self.context, self.data, self.device, self.total = context, data, context.device, total
        share = total // processes
        self.part = slice(share * context.accelerator.process_index, share * (context.accelerator.process_index + 1))
        self.empty = data.empty.to(self.device) if data.guided else None
        self.orders: dict[tuple[str, int, int], Tensor] = {}

    def conditioning(self, prompt_ids: Tensor) -> Conditioning:
        return self.data.conditioning[prompt_ids].to(self.device)

    def generator(self, *parts: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(stable_seed(self.context.seed, *parts))

    def drawn(self, population: int, iteration: int, purpose: str) -> Tensor:
        """Indices of the whole batch: one random order of the population after the other, cut into batches."""
        first = iteration * self.total
        positions = torch.arange(first, first + self.total)
        epochs = torch.unique(positions // population).tolist()
        keys = [(purpose, population, epoch) for epoch in epochs]
        # kept from batch to batch: an order of 100,000 rows takes longer to draw than its rows to read
        self.orders = {key: self.orders[key] if key in self.orders else self._order(*key) for key in keys}
        orders = dict(zip(epochs, self.orders.values(), strict=True))
        return torch.stack([orders[int(position) // population][int(position) % population] for position in positions])

    def _order(self, purpose: str, population: int, epoch: int) -> Tensor:
        return torch.randperm(population, generator=self.generator(purpose, epoch))

    def observe(self, iteration: int, outputs: ModelOutputs) -> None:
        """Nothing to learn from the outputs."""

    def state(self) -> Tensor | None:
        """Nothing to keep."""
        return None

    def restore(self, state: Tensor) -> None:
        """Nothing was kept."""


class SerialToParallelSource(_Source):
    """Ours: latents of the teacher's own trajectories, many steps and prompts at once."""

    def batch(self, iteration: int) -> Batch:
        """Rows of the serial dataset, with the teacher's outputs that collection kept."""
        rows = self.drawn(len(self.data), iteration, "rows")[self.part]
        shard = self.data.shard
        blank = None if shard.unconditional is None else shard.unconditional[rows].to(self.device)
        return Batch(
            latents=shard.latents[rows].to(self.device),
            steps=shard.steps[rows].to(self.device),
            conditioning=self.conditioning(shard.prompt_ids[rows]),
            empty=self.empty,
            target=ModelOutputs(shard.conditional[rows].to(self.device), blank),
        )


class ParallelSource(_Source):
    """For ablation: Gaussian noise on clean latents, as diffusion models are trained."""

    def batch(self, iteration: int) -> Batch:
        """Clean latents of drawn prompts, noised to drawn steps."""
        plan, clean = self.context.plan, self.data.shard.final
        prompts = self.drawn(len(clean), iteration, "prompts")
        generator = self.generator("noise", iteration)
        steps = torch.randint(plan.calls, (self.total,), generator=generator)
        noise = torch.randn((self.total, *clean.shape[1:]), generator=generator)
        keep, add = torch.from_numpy(plan.noising)[steps].reshape(self.total, 2, 1, 1, 1).unbind(1)
        scale = torch.tensor([float(plan.step_map(int(step), int(step)).u[0]) for step in steps]).reshape(-1, 1, 1, 1)
        latents = scale * (keep * clean[prompts] + add * noise)
        return Batch(
            latents=latents[self.part].to(self.device),
            steps=steps[self.part].to(self.device),
            conditioning=self.conditioning(prompts[self.part]),
            empty=self.empty,
            target=None,
        )


class SerialSource(_Source):
    """For ablation: one step after the other along the student's own trajectory, a new batch of prompts each run."""

    def __init__(self, context: TrainingContext, data: SerialData) -> None:
        super().__init__(context, data)
        self.slots: Tensor | None = None
        """f32 [B, S, C, h, w], the sampler's state."""

    def batch(self, iteration: int) -> Batch:
        """The student's latents at the next step; noise at the first."""
        plan, shape = self.context.plan, self.data.shard.noise.shape[1:]
        round_, step = divmod(iteration, plan.calls)
        prompts = self.drawn(len(self.data.conditioning), round_, "prompts")[self.part]
        if step == 0 or self.slots is None:
            noise = torch.randn((self.total, *shape), generator=self.generator("noise", round_))[self.part]
            self.slots = torch.zeros(len(prompts), plan.slots, *shape, device=self.device)
            self.slots[:, 0] = float(plan.init_noise_sigma[0]) * noise.to(self.device)
        u = torch.from_numpy(plan.step_map(0, step).u).to(self.device)
        return Batch(
            latents=torch.einsum("s,bschw->bchw", u, self.slots),
            steps=torch.full((len(prompts),), step, device=self.device),
            conditioning=self.conditioning(prompts),
            empty=self.empty,
            target=None,
        )

    def observe(self, iteration: int, outputs: ModelOutputs) -> None:
        """Move along the trajectory by the student's guided output."""
        assert self.slots is not None
        plan = self.context.plan
        round_, step = divmod(iteration, plan.calls)
        row = plan.step_map(0, step)
        matrix, add, fresh = (torch.from_numpy(part).to(self.device) for part in (row.matrix, row.output, row.noise))
        guided = combine(outputs, self.context.recipe.sampling.guidance).float()
        self.slots = torch.einsum("rs,bschw->brchw", matrix, self.slots) + torch.einsum("s,bchw->bschw", add, guided)
        if bool(fresh.any()):
            shape = (self.total, *guided.shape[1:])
            noise = torch.randn(shape, generator=self.generator("fresh", round_, step))[self.part].to(self.device)
            self.slots = self.slots + torch.einsum("s,bchw->bschw", fresh, noise)

    def state(self) -> Tensor | None:
        """The sampler's state."""
        return self.slots

    def restore(self, state: Tensor) -> None:
        """Take the sampler's state of the whole batch."""
        self.slots = state[self.part].to(self.device)


def make_source(context: TrainingContext, data: SerialData, pipeline: Pipeline) -> BatchSource:
    """The batch source of a pipeline."""
    kinds: dict[str, type[SerialToParallelSource] | type[ParallelSource] | type[SerialSource]] = {
        "serial-to-parallel": SerialToParallelSource,
        "parallel": ParallelSource,
        "serial": SerialSource,
    }
    return kinds[pipeline](context, data)
