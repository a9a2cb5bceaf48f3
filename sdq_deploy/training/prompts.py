"""Prompts of a training: the embedded model's own captions, the split into training and held-out ones, their seeds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["PromptSplit", "shapes_prompts", "split_prompts", "stable_seed"]


@dataclass(frozen=True)
class PromptSplit:
    """Training prompts, and prompts held out to choose the sensitive layers and the best state."""

    training: tuple[str, ...]
    validation: tuple[str, ...]


def shapes_prompts(num_prompts: int, validation_prompts: int) -> list[str]:
    """Captions of the embedded model's splits for calibration and, at the end, for validation."""
    from sdq_deploy.shapes64 import splits

    return splits.calibration_prompts(num_prompts) + splits.validation_prompts(validation_prompts)


def split_prompts(prompts: list[str], num_prompts: int, validation_prompts: int) -> PromptSplit:
    """Hold out the last prompts of the list (at most half of it); cycle what is too short: seeds differ by position.

    A list of one prompt is its own validation, with other seeds.
    """
    held_count = min(validation_prompts, len(prompts) // 2)
    kept = prompts[: len(prompts) - held_count]
    held = prompts[len(prompts) - held_count :] or prompts
    return PromptSplit(_cycle(kept, num_prompts), _cycle(held, validation_prompts))


def _cycle(prompts: list[str], count: int) -> tuple[str, ...]:
    return tuple(prompts[index % len(prompts)] for index in range(count))


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on `parts` alone: the same in every process, on every machine."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
