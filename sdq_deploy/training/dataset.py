"""The serial dataset on disk and in memory.

index.json      what the shards were made from, and their names
prompts.safetensors   what the denoiser is told of the prompts of "training", "validation" and "empty", by name
training-*.safetensors, validation-*.safetensors   per kept latent: what the model saw and what the teacher answered
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdq_engines.files import atomic_write
from sdq_export.conditioning import Conditioning

__all__ = [
    "INDEX",
    "SerialData",
    "Shard",
    "load_prompts",
    "load_split",
    "save_prompts",
    "shard_is_whole",
    "shard_name",
    "shard_of",
]

INDEX = "index.json"
PROMPTS = "prompts.safetensors"


def shard_name(split: str, number: int) -> str:
    """File of one shard."""
    return f"{split}-{number:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """Kept latents of some prompts, sorted by prompt, then step; all tensors on the CPU.

    Attributes:
        latents: f32 [N, C, h, w], the model's input, as the sampler scaled it.
        steps: int64 [N].
        prompt_ids: int64 [N], position of the prompt in its split.
        conditional: f32 [N, C, h, w], the teacher's output for the prompt.
        unconditional: f32 [N, C, h, w], the teacher's output for the empty prompt; absent (None) without guidance.
        noise: f32 [P, C, h, w], the starting noise of each of the shard's prompts.
        final: f32 [P, C, h, w], where the teacher's trajectory ended.
    """

    latents: Tensor
    steps: Tensor
    prompt_ids: Tensor
    conditional: Tensor
    unconditional: Tensor | None
    noise: Tensor
    final: Tensor

    def save(self, path: Path, inputs: str) -> None:
        """Write atomically, signed with the hash of what it was made from."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if value is not None}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"inputs": inputs})


def shard_is_whole(path: Path, inputs: str) -> bool:
    """Whether the shard exists and was made from the same inputs."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("inputs") == inputs


def shard_of(tensors: dict[str, Tensor]) -> Shard:
    """The shard whose fields these are; `unconditional` may be absent."""
    others = {name: value for name, value in tensors.items() if name != "unconditional"}
    return Shard(unconditional=tensors.get("unconditional"), **others)


@dataclass(frozen=True)
class SerialData:
    """A split of the dataset in memory: its shards joined, and what the denoiser is told of its prompts."""

    shard: Shard
    conditioning: Conditioning
    """Of the split's prompts."""
    empty: Conditioning
    """Of the empty prompt."""

    def __len__(self) -> int:
        return self.shard.latents.shape[0]

    @property
    def guided(self) -> bool:
        """Whether the teacher ran on the empty prompt too."""
        return self.shard.unconditional is not None

    def at_step(self, step: int, limit: int) -> Tensor:
        """Indices of the first `limit` latents of one step."""
        return (self.shard.steps == step).nonzero().flatten()[:limit]


def load_split(folder: Path, split: str) -> SerialData:
    """Join the shards of "training" or "validation"."""
    parts = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    prompts = load_prompts(folder)
    return SerialData(shard_of(joined), prompts[split], prompts["empty"])


def save_prompts(folder: Path, prompts: Mapping[str, Conditioning]) -> None:
    """Write the conditioning of "training", "validation" and "empty"."""
    tensors = {name: tensor for prefix, each in prompts.items() for name, tensor in each.named(prefix).items()}
    with atomic_write(folder / PROMPTS) as temporary:
        save_file(tensors, temporary)


def load_prompts(folder: Path) -> dict[str, Conditioning]:
    """Read what `save_prompts` wrote."""
    tensors = load_file(folder / PROMPTS)
    return {name: Conditioning.from_named(tensors, name) for name in ("training", "validation", "empty")}
