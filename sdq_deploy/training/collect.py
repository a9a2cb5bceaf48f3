"""Stage collect: the teacher's real inference over a prompt list, some latents of which are kept (the serial dataset).

A shard is the unit of work: always the same prompts, computed together, with seeds and kept steps that depend on the
run's seed and the prompt's position alone. So any number of processes makes the same set, and a killed collection
loses the shards under way, no more. What is in memory is one shard, whatever the number of prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sdq_deploy.sharing import await_files
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import (
    EMPTY,
    INDEX,
    Shard,
    load_empty,
    load_prompts,
    prompts_file,
    save_empty,
    save_prompts,
    shard_is_whole,
    shard_name,
    shard_of,
)
from sdq_deploy.training.prompts import stable_seed
from sdq_engines.files import atomic_write_json
from sdq_export.conditioning import Conditioning
from sdq_export.guidance import GuidedDenoiser, ModelOutputs
from sdq_export.sampler import run_sampler

__all__ = ["collect", "collect_shard", "kept_steps", "starting_noise"]

_logger = logging.getLogger(__name__)


def collect(context: TrainingContext, inputs: str) -> None:
    """Make the shards that are not there yet, this process's share of them, and the index last.

    Args:
        context: the training.
        inputs: hash of all that the dataset depends on; shards made from other inputs are made again.
    """
    folder, accelerator = context.folder.dataset, context.accelerator
    folder.mkdir(parents=True, exist_ok=True)
    work = _shards_of(context)
    if accelerator.is_main_process:
        _remove_others(context, [task.name for task in work])
    mine = work[accelerator.process_index :: accelerator.num_processes]
    _encode(context, mine, inputs)
    accelerator.wait_for_everyone()
    await_files([folder / EMPTY])
    empty = load_empty(folder)
    missing = [task for task in mine if not shard_is_whole(folder / task.name, inputs)]
    with context.bar("collect", len(mine), len(mine) - len(missing)) as advance:
        for task in missing:
            shard = collect_shard(context, task.split, task.members, load_prompts(folder, task.name), empty)
            shard.save(folder / task.name, inputs)
            advance()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        atomic_write_json(folder / INDEX, {"inputs": inputs, "shards": [task.name for task in work]})
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class _Task:
    """One shard to make: its file, its split and the positions of its prompts there."""

    name: str
    split: str
    members: range


def _shards_of(context: TrainingContext) -> list[_Task]:
    """Every shard, held-out prompts first."""
    size = context.recipe.collect.prompts_per_shard
    splits = (("validation", context.prompts.validation), ("training", context.prompts.training))
    return [
        _Task(shard_name(split, number), split, range(first, min(first + size, len(prompts))))
        for split, prompts in splits
        for number, first in enumerate(range(0, len(prompts), size))
    ]


def _remove_others(context: TrainingContext, wanted: Sequence[str]) -> None:
    """Shards of an earlier, larger dataset are of no use any more."""
    folder, names = context.folder.dataset, set(wanted)
    for path in (*folder.glob("*-*.safetensors"), *prompts_file(folder, "").glob("*-*.safetensors")):
        if path.name not in names:
            path.unlink()


def _encode(context: TrainingContext, tasks: Sequence[_Task], inputs: str) -> None:
    """Write the conditioning of these shards' prompts and, in the main process, of the empty one.

    Before the teacher is there to share the memory with.
    Each shard's by itself: how many go through an encoder together decides its rounding, and that must not depend on
    the number of processes.
    """
    folder, prompts, source = context.folder.dataset, context.prompts, context.source
    missing = [task for task in tasks if not shard_is_whole(prompts_file(folder, task.name), inputs)]
    lacks_empty = context.accelerator.is_main_process and not shard_is_whole(folder / EMPTY, inputs)
    if not missing and not lacks_empty:
        return
    lists = {"training": prompts.training, "validation": prompts.validation}
    cut: list[str] = []
    with _text_encoders(context), context.bar("encode prompts", len(missing)) as advance:
        if lacks_empty:
            save_empty(folder, source.family.encode_prompts([None]), inputs)
        for task in missing:
            texts = [lists[task.split][member] for member in task.members]
            cut += source.family.text_encoders[0].cut(texts)
            save_prompts(folder, task.name, source.family.encode_prompts(texts), inputs)
            advance()
    if cut:
        _logger.warning(
            "%d prompt(s) are longer than the model takes and were cut, the first %r; --prompt-chunks N takes more.",
            len(cut),
            cut[0],
        )


@contextmanager
def _text_encoders(context: TrainingContext) -> Iterator[None]:
    """Have the text encoders on the device for the length of the block. No later stage needs them: they are let go."""
    names = [encoder.component for encoder in context.source.family.text_encoders]
    for name in names:
        context.source.part(name).to(context.device)
    try:
        yield
    finally:
        for name in names:
            context.source.release(name)


@torch.no_grad()
def collect_shard(
    context: TrainingContext, split: str, members: range, conditioning: Conditioning, empty: Conditioning
) -> Shard:
    """Run the teacher from noise to the end for the prompts `members` and keep the latents of their chosen steps.

    Args:
        context: the training.
        split: "training" or "validation"; of the latter every step is kept.
        members: positions of the prompts in the split.
        conditioning: of these prompts.
        empty: of the empty prompt.
    """
    generators = [torch.Generator().manual_seed(stable_seed(context.seed, split, member)) for member in members]
    noise = starting_noise(context, generators)
    chosen = torch.stack([kept_steps(context, split, member) for member in members])
    answers: list[ModelOutputs] = []
    kept: list[dict[str, Tensor]] = []

    def keep(step: int, model_input: Tensor, _: Tensor) -> None:
        rows = chosen[:, step].nonzero().flatten()
        at = rows.to(context.device)
        outputs = answers.pop()
        entry = {
            "latents": model_input[at],
            "steps": torch.full_like(rows, step),
            "prompt_ids": torch.tensor(list(members))[rows],
            "conditional": outputs.conditional[at],
        }
        if outputs.unconditional is not None:
            entry["unconditional"] = outputs.unconditional[at]
        kept.append({name: value.cpu() for name, value in entry.items()})

    guided = GuidedDenoiser(
        context.teacher, context.recipe.sampling.guidance, conditioning, empty, on_outputs=answers.append
    )
    final = run_sampler(context.plan, guided, noise.to(context.device), generator=generators, on_step=keep)
    joined = {name: torch.cat([entry[name] for entry in kept]) for name in kept[0]}
    order = torch.argsort(joined["prompt_ids"] * context.plan.calls + joined["steps"])
    return shard_of({name: value[order] for name, value in joined.items()} | {"noise": noise, "final": final.cpu()})


def starting_noise(context: TrainingContext, generators: Sequence[torch.Generator]) -> Tensor:
    """Unit noise f32 [P, C, h, w] on the CPU, one generator per sample, as diffusers draws it."""
    shape = (1, *context.source.family.latent_shape)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def kept_steps(context: TrainingContext, split: str, member: int) -> Tensor:
    """bool [T]: the steps whose latents are kept for one prompt; all of them for a held-out prompt."""
    calls = context.plan.calls
    if split == "validation":
        return torch.ones(calls, dtype=torch.bool)
    generator = torch.Generator().manual_seed(stable_seed(context.seed, "steps", member))
    chosen = torch.randperm(calls, generator=generator)[: context.recipe.collect.steps_per_prompt]
    return torch.zeros(calls, dtype=torch.bool).index_fill_(0, chosen, True)
