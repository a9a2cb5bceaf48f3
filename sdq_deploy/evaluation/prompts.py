"""What an evaluation draws: prompts with their seeds, and for captions of shapes what the images must show."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdq_engines.errors import SdqError

__all__ = ["Contents", "PromptSet", "Split", "prompts_of_file", "prompts_of_split"]

#: The (kind, colour) pairs that an image of a shapes-64 caption must show.
Contents = frozenset[tuple[str, str]]

#: Splits of shapes-64 that nothing was trained or calibrated on.
Split = Literal["held_out", "validation"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts and noise seeds, N of each, in order.

    Attributes:
        title: where they come from, for people.
        contents: what each image must show; None where nothing can tell.
    """

    title: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    contents: tuple[Contents, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Hash of the prompts and seeds, in hexadecimal: figures with the same hash were taken on the same set."""
        pairs = list(zip(self.prompts, self.seeds, strict=True))
        return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()


def prompts_of_split(split: Split, count: int) -> PromptSet:
    """The first `count` caption-seed pairs of a split of shapes-64."""
    from sdq_deploy.shapes64 import held_out_pairs, validation_pairs

    pairs = (held_out_pairs if split == "held_out" else validation_pairs)(count)
    return PromptSet(
        title=f"shapes-64, {split.replace('_', '-')}",
        prompts=tuple(pair.prompt for pair in pairs),
        seeds=tuple(pair.seed for pair in pairs),
        contents=tuple(pair.scene.contents for pair in pairs),
    )


def prompts_of_file(path: Path, count: int | None, first_seed: int, shapes: bool) -> PromptSet:
    """Prompts of a file, see `read_prompts`; image i starts from `first_seed + i`.

    Args:
        path: text or a table.
        count: images to make; more than there are lines takes the lines again, with further seeds. None: one a line.
        first_seed: of the first image.
        shapes: whether they are captions of shapes-64, from which is known what the images must show.

    Raises:
        SdqError: see `read_prompts`; or a caption names no shape.
    """
    from sdq_deploy.training.prompt_files import read_prompts

    lines = read_prompts(path)
    wanted = count or len(lines)
    prompts = tuple(lines[index % len(lines)] for index in range(wanted))
    return PromptSet(
        title=path.name,
        prompts=prompts,
        seeds=tuple(range(first_seed, first_seed + wanted)),
        contents=_contents(prompts) if shapes else None,
    )


def _contents(prompts: tuple[str, ...]) -> tuple[Contents, ...]:
    from sdq_deploy.shapes64.captions import contents_of

    found = tuple(contents_of(prompt) for prompt in prompts)
    for prompt, contents in zip(prompts, found, strict=True):
        if not contents:
            raise SdqError(
                f"The prompt {prompt!r} names no shape that shapes-64 can draw.",
                "Write captions such as: a red circle on a blue background",
            )
    return found
