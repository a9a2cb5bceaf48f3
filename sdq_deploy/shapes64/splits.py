"""The prompts of each split; no caption is in two of them."""

from __future__ import annotations

from dataclasses import dataclass

from sdq_deploy.shapes64.scenes import Scene, Split, sample_scene

__all__ = ["CaptionSeed", "calibration_prompts", "held_out_pairs", "validation_pairs", "validation_prompts"]


@dataclass(frozen=True)
class CaptionSeed:
    """A prompt, the noise seed to make its image with, and the scene that the image must show."""

    prompt: str
    seed: int
    scene: Scene


def held_out_pairs(count: int) -> list[CaptionSeed]:
    """The first `count` pairs to report figures on."""
    return _pairs("held_out", count, first_seed=30_000_000)


def validation_pairs(count: int) -> list[CaptionSeed]:
    """The first `count` pairs to choose settings on: never report on them."""
    return _pairs("validation", count, first_seed=20_000_000)


def validation_prompts(count: int) -> list[str]:
    """The first `count` prompts to choose settings and best states on."""
    return [pair.prompt for pair in validation_pairs(count)]


def calibration_prompts(count: int) -> list[str]:
    """The first `count` prompts for the serial dataset and calibration."""
    return [sample_scene("calibration", index).caption for index in range(count)]


def _pairs(split: Split, count: int, first_seed: int) -> list[CaptionSeed]:
    scenes = [sample_scene(split, index) for index in range(count)]
    return [CaptionSeed(scene.caption, first_seed + index, scene) for index, scene in enumerate(scenes)]
