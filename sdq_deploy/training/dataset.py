"""The serial dataset: on disk in shards, in memory as much of it as is asked for.

index.json      what the shards were made from, and their names, in order
prompts.safetensors   what the denoiser is told of the empty prompt
training-*.safetensors, validation-*.safetensors   per kept latent: what the model saw and what the teacher answered
prompts/training-*.safetensors, prompts/validation-*.safetensors   what the denoiser is told of the prompts of the shard

Datasets of earlier versions have all prompts in prompts.safetensors, and are read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdq_deploy.sharing import await_files
from sdq_deploy.training.stored import Prompts, Rows, StoredPrompts, stored_tensors
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write
from sdq_export.conditioning import Conditioning

__all__ = [
    "EMPTY",
    "INDEX",
    "SerialData",
    "Shard",
    "SplitRows",
    "load_empty",
    "load_prompts",
    "load_split",
    "prompts_file",
    "save_empty",
    "save_prompts",
    "shard_is_whole",
    "shard_name",
    "shard_of",
]

INDEX = "index.json"
EMPTY = "prompts.safetensors"

_PROMPTS = "prompts"


def shard_name(split: str, number: int) -> str:
    """File of one shard."""
    return f"{split}-{number:05d}.safetensors"


def prompts_file(folder: Path, shard: str) -> Path:
    """Where the conditioning of a shard's prompts is."""
    return folder / _PROMPTS / shard


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
        _save({name: value for name, value in vars(self).items() if value is not None}, path, inputs)


@dataclass(frozen=True)
class SplitRows:
    """All shards of a split as one, of which rows are read when they are asked for (`shard.latents[rows]`).

    The fields are those of `Shard`. Steps and prompt ids, 16 bytes a latent, are in memory.
    """

    latents: Rows
    steps: Tensor
    prompt_ids: Tensor
    conditional: Rows
    unconditional: Rows | None
    noise: Rows
    final: Rows


def shard_is_whole(path: Path, inputs: str) -> bool:
    """Whether the shard, or the file of its prompts, exists and was made from the same inputs."""
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
    """A split of the dataset: its shards joined, and what the denoiser is told of its prompts."""

    shard: SplitRows
    conditioning: Prompts
    """Of the split's prompts."""
    empty: Conditioning
    """Of the empty prompt."""

    def __len__(self) -> int:
        return len(self.shard.latents)

    @property
    def guided(self) -> bool:
        """Whether the teacher ran on the empty prompt too."""
        return self.shard.unconditional is not None

    def at_step(self, step: int, limit: int) -> Tensor:
        """Indices of the first `limit` latents of one step."""
        return (self.shard.steps == step).nonzero().flatten()[:limit]


def load_split(folder: Path, split: str) -> SerialData:
    """Open the shards of "training" or "validation"; their latents and prompts stay on disk.

    Raises:
        SdqError: the dataset is not finished, or files of it are not there.
    """
    names = _shards_in(folder, split)
    tensors = stored_tensors([folder / name for name in names])
    unconditional = tensors.get("unconditional")
    rows = SplitRows(
        latents=tensors["latents"],
        steps=tensors["steps"][:],
        prompt_ids=tensors["prompt_ids"][:],
        conditional=tensors["conditional"],
        unconditional=unconditional,
        noise=tensors["noise"],
        final=tensors["final"],
    )
    return SerialData(rows, _prompts_of(folder, split, names), load_empty(folder))


def _shards_in(folder: Path, split: str) -> list[str]:
    """Names of the split's shards, in order. By the index, so that none that is out of sight is left out in silence."""
    if not (folder / INDEX).is_file():
        await_files([folder / INDEX])
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    names = [name for name in index["shards"] if name.startswith(f"{split}-")]
    if not names:
        raise SdqError(f"The serial dataset in {folder} has no shards of {split!r}.", "Train into a new --out.")
    await_files([folder / name for name in names])
    return names


def _prompts_of(folder: Path, split: str, shards: list[str]) -> Prompts:
    with safe_open(folder / EMPTY, framework="pt") as file:
        earlier = any(name.startswith(f"{split}.") for name in file.keys())  # noqa: SIM118 - not a mapping
    if earlier:
        start = f"{split}."
        stored = stored_tensors([folder / EMPTY])
        return StoredPrompts({name[len(start) :]: each for name, each in stored.items() if name.startswith(start)})
    files = [prompts_file(folder, name) for name in shards]
    await_files(files)
    return StoredPrompts(stored_tensors(files))


def save_prompts(folder: Path, shard: str, prompts: Conditioning, inputs: str) -> None:
    """Write the conditioning of a shard's prompts, signed as the shard is."""
    _save(prompts.tensors, prompts_file(folder, shard), inputs)


def load_prompts(folder: Path, shard: str) -> Conditioning:
    """Read what `save_prompts` wrote."""
    return Conditioning(load_file(prompts_file(folder, shard)))


def save_empty(folder: Path, empty: Conditioning, inputs: str) -> None:
    """Write the conditioning of the empty prompt, signed as the shards are."""
    _save(empty.named("empty"), folder / EMPTY, inputs)


def load_empty(folder: Path) -> Conditioning:
    """Read what `save_empty` wrote."""
    with safe_open(folder / EMPTY, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("empty.")]  # noqa: SIM118 - not a mapping
        return Conditioning.from_named({name: file.get_tensor(name).clone() for name in names}, "empty")


def _save(tensors: Mapping[str, Tensor], path: Path, inputs: str) -> None:
    with atomic_write(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata={"inputs": inputs})
