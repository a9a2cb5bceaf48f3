"""Stage collect: the teacher's real inference over a prompt list, some latents of which are kept (the serial dataset).

A shard is the unit of work: always the same prompts, computed together, with seeds and kept steps that depend on the
run's seed and the prompt's position alone. So any number of processes makes the same set, and a killed collection
loses the shards under way, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import EMBEDDINGS, INDEX, Shard, shard_is_whole, shard_name, shard_of
from sdq_deploy.training.guidance import ModelOutputs, guide, predict_outputs
from sdq_deploy.training.prompts import stable_seed
from sdq_engines.files import atomic_write, atomic_write_json
from sdq_export.families.sd import encode_prompts
from sdq_export.sampler import run_sampler

__all__ = ["collect", "collect_shard", "kept_steps", "starting_noise"]


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
        _remove_others(context, [name for name, _, _ in work])
        _write_embeddings(context)
    accelerator.wait_for_everyone()
    embeddings = _read_embeddings(context)
    mine = work[accelerator.process_index :: accelerator.num_processes]
    missing = [item for item in mine if not shard_is_whole(folder / item[0], inputs)]
    with context.bar("collect", len(mine), len(mine) - len(missing)) as advance:
        for name, split, members in missing:
            shard = collect_shard(context, split, members, embeddings[split][members], embeddings["empty"])
            shard.save(folder / name, inputs)
            advance()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        atomic_write_json(folder / INDEX, {"inputs": inputs, "shards": [name for name, _, _ in work]})
    accelerator.wait_for_everyone()


def _shards_of(context: TrainingContext) -> list[tuple[str, str, range]]:
    """(file, split, positions of its prompts) of every shard, held-out prompts first."""
    size = context.recipe.collect.prompts_per_shard
    splits = (("validation", context.prompts.validation), ("training", context.prompts.training))
    return [
        (shard_name(split, number), split, range(first, min(first + size, len(prompts))))
        for split, prompts in splits
        for number, first in enumerate(range(0, len(prompts), size))
    ]


def _remove_others(context: TrainingContext, wanted: Sequence[str]) -> None:
    """Shards of an earlier, larger dataset would be read with the new ones."""
    for path in context.folder.dataset.glob("*-*.safetensors"):
        if path.name not in wanted:
            path.unlink()


@torch.no_grad()
def collect_shard(context: TrainingContext, split: str, members: range, embeddings: Tensor, empty: Tensor) -> Shard:
    """Run the teacher from noise to the end for the prompts `members` and keep the latents of their chosen steps.

    Args:
        context: the training.
        split: "training" or "validation"; of the latter every step is kept.
        members: positions of the prompts in the split.
        embeddings: f32 [P, L, D] of these prompts.
        empty: f32 [1, L, D].
    """
    scale, device = context.recipe.sampling.guidance_scale, context.device
    embeddings, blank = embeddings.to(device), empty.to(device) if scale != 1 else None
    generators = [torch.Generator().manual_seed(stable_seed(context.seed, split, member)) for member in members]
    noise = starting_noise(context, generators)
    chosen = torch.stack([kept_steps(context, split, member) for member in members])
    answers: list[ModelOutputs] = []
    kept: list[dict[str, Tensor]] = []

    def predict(model_input: Tensor, step: int) -> Tensor:
        steps = torch.full((len(members),), step, device=device)
        answers.append(predict_outputs(context.teacher, model_input, steps, embeddings, blank))
        return guide(answers[-1], scale)

    def keep(step: int, model_input: Tensor, _: Tensor) -> None:
        rows = chosen[:, step].nonzero().flatten()
        at = rows.to(device)
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

    final = run_sampler(context.plan, predict, noise.to(device), generator=generators, on_step=keep)
    joined = {name: torch.cat([entry[name] for entry in kept]) for name in kept[0]}
    order = torch.argsort(joined["prompt_ids"] * context.plan.calls + joined["steps"])
    return shard_of({name: value[order] for name, value in joined.items()} | {"noise": noise, "final": final.cpu()})


def starting_noise(context: TrainingContext, generators: Sequence[torch.Generator]) -> Tensor:
    """Unit noise f32 [P, C, h, w] on the CPU, one generator per sample, as diffusers draws it."""
    config: Any = context.source.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, config.out_channels, height, width)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def kept_steps(context: TrainingContext, split: str, member: int) -> Tensor:
    """bool [T]: the steps whose latents are kept for one prompt; all of them for a held-out prompt."""
    calls = context.plan.calls
    if split == "validation":
        return torch.ones(calls, dtype=torch.bool)
    generator = torch.Generator().manual_seed(stable_seed(context.seed, "steps", member))
    chosen = torch.randperm(calls, generator=generator)[: context.recipe.collect.steps_per_prompt]
    return torch.zeros(calls, dtype=torch.bool).index_fill_(0, chosen, True)


def _write_embeddings(context: TrainingContext) -> None:
    source, prompts = context.source, context.prompts
    source.text_encoder.to(context.device)
    tensors = {
        "training": encode_prompts(source, prompts.training),
        "validation": encode_prompts(source, prompts.validation),
        "empty": encode_prompts(source, [""]),
    }
    with atomic_write(context.folder.dataset / EMBEDDINGS) as temporary:
        save_file(tensors, temporary)


def _read_embeddings(context: TrainingContext) -> dict[str, Tensor]:
    return load_file(context.folder.dataset / EMBEDDINGS)
