"""Seeded, captioned scenes: what is in a 64x64 picture, where it is, and the sentence that says so.

A scene is drawn from its split and index alone, so any machine gives the same one. Splits are disjoint twice over:
each has its own random stream, and a caption belongs to the one split that its hash names, so a held-out caption was
never trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from sdq_deploy.shapes64.captions import KINDS, caption_of
from sdq_deploy.shapes64.objects import TEXTURES, Background, SceneObject

__all__ = [
    "BACKGROUND_COLOURS",
    "COLOURS",
    "IMAGE_SIZE",
    "KINDS",
    "Scene",
    "Split",
    "sample_scene",
]

IMAGE_SIZE = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 28, 36),
    "yellow": (255, 228, 36),
    "green": (22, 166, 58),
    "cyan": (56, 212, 236),
    "blue": (36, 66, 236),
    "purple": (150, 32, 186),
    "pink": (255, 144, 200),
}

BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "gray": (122, 122, 122),
    "black": (16, 16, 16),
    "navy": (18, 24, 88),
}

# Below this Euclidean RGB distance a shape is hard to tell from what lies behind it.
_MIN_CONTRAST = 105.0

_NUMBER_OF_OBJECTS = (0.45, 0.38, 0.17)
_RADIUS = {"small": 10.0, "large": 13.8}
_MARGIN = 1.5  # pixels between a shape and the edge, and between two shapes
EXTENT = 1.06  # the farthest point of any kind, in radii

_T = TypeVar("_T")
Split = Literal["train", "calibration", "validation", "held_out"]
_SPLIT_STREAM: dict[str, int] = {"train": 0, "calibration": 1, "validation": 2, "held_out": 3}
# 64 buckets of caption hashes; whatever is not named here belongs to training.
_SPLIT_BUCKETS: dict[str, range] = {"held_out": range(4), "validation": range(4, 6), "calibration": range(6, 10)}


@dataclass(frozen=True)
class Scene:
    """What a picture holds. `relation` is the layout that the caption names, None where it names none."""

    objects: tuple[SceneObject, ...]
    background: Background
    relation: str | None
    caption: str

    @property
    def contents(self) -> frozenset[tuple[str, str]]:
        """The set of (kind, colour) that the picture must show; no two objects of a scene share one."""
        return frozenset((item.kind, item.colour) for item in self.objects)


def sample_scene(split: Split, index: int) -> Scene:
    """The scene number `index` of a split; the same on every machine."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_SPLIT_STREAM[split], index])))
    while True:
        scene = _draw_scene(rng)
        if _split_of(scene.caption) == split:
            return scene


def _split_of(caption: str) -> str:
    bucket = hashlib.sha256(caption.encode()).digest()[0] % 64
    return next((name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets), "train")


def _draw_scene(rng: np.random.Generator) -> Scene:
    count = 1 + int(rng.choice(3, p=_NUMBER_OF_OBJECTS))
    kinds_and_colours = [
        divmod(int(code), len(COLOURS)) for code in rng.choice(len(KINDS) * len(COLOURS), count, False)
    ]
    layout = (_place_one, _place_two, _place_three)[count - 1]
    relation, sizes, radii, centres = layout(rng)
    objects = tuple(
        SceneObject(KINDS[kind], list(COLOURS)[colour], size, x, y, radius)
        for (kind, colour), size, radius, (x, y) in zip(kinds_and_colours, sizes, radii, centres, strict=True)
    )
    background = _draw_background(rng, {item.colour for item in objects})
    return Scene(objects, background, relation, caption_of(objects, background, relation))


# --- layouts: (relation, sizes named in the caption, radii, centres) -------------------------------------------------

_Layout = tuple[str | None, list[str | None], list[float], list[tuple[float, float]]]


def _place_one(rng: np.random.Generator) -> _Layout:
    size, radius = _draw_size(rng)
    relation = _choose(rng, ("on the left", "on the right", "at the top", "at the bottom", "in the middle", None))
    reach = EXTENT * radius + _MARGIN
    low, high, half = reach, IMAGE_SIZE - reach, IMAGE_SIZE / 2
    x, y = rng.uniform(low, high), rng.uniform(low, high)
    jitter = rng.uniform(-2.0, 2.0, size=2)
    if relation == "in the middle":
        x, y = half + jitter[0], half + jitter[1]
    elif relation in ("on the left", "on the right"):
        x = low + abs(jitter[0]) if relation == "on the left" else high - abs(jitter[0])
        y = half + (y - half) * 0.5
    elif relation in ("at the top", "at the bottom"):
        y = low + abs(jitter[1]) if relation == "at the top" else high - abs(jitter[1])
        x = half + (x - half) * 0.5
    return relation, [size], [radius], [(x, y)]


def _place_two(rng: np.random.Generator) -> _Layout:
    (size_a, radius_a), (size_b, radius_b) = _draw_size(rng), _draw_size(rng)
    along = _spread(rng, [radius_a, radius_b])
    across = [_anywhere(rng, radius_a), _anywhere(rng, radius_b)]
    horizontal, forward = bool(rng.integers(2)), bool(rng.integers(2))
    if not forward:
        along = [IMAGE_SIZE - position for position in along]
    centres = list(zip(along, across, strict=True)) if horizontal else list(zip(across, along, strict=True))
    named = ("left of", "right of") if horizontal else ("above", "below")
    relation = named[0 if forward else 1] if rng.random() < 0.75 else None
    return relation, [size_a, size_b], [radius_a, radius_b], centres


def _place_three(rng: np.random.Generator) -> _Layout:
    shape = _choose(rng, ("row", "column", "corners"))
    if shape == "corners":
        radii = [11.0 * rng.uniform(0.97, 1.03) for _ in range(3)]
        slots = [(17.0, 17.0), (47.0, 17.0), (17.0, 47.0), (47.0, 47.0)]
        chosen = [slots[i] for i in rng.permutation(4)[:3]]
        centres = [(x + rng.uniform(-2.5, 2.5), y + rng.uniform(-2.5, 2.5)) for x, y in chosen]
        return None, [None] * 3, radii, centres
    radii = [9.1 * rng.uniform(0.98, 1.0) for _ in range(3)]
    along = _spread(rng, radii)
    middle = rng.uniform(20.0, 44.0)
    across = [middle + rng.uniform(-5.0, 5.0) for _ in range(3)]
    if shape == "row":
        return "from left to right", [None] * 3, radii, list(zip(along, across, strict=True))
    return "from top to bottom", [None] * 3, radii, list(zip(across, along, strict=True))


def _draw_size(rng: np.random.Generator) -> tuple[str | None, float]:
    size = "small" if rng.random() < 0.5 else "large"
    radius = _RADIUS[size] * rng.uniform(0.96, 1.04)
    return (size if rng.random() < 0.7 else None), radius


def _spread(rng: np.random.Generator, radii: list[float]) -> list[float]:
    """Ordered centres along one axis, touching neither each other nor the edges, the slack shared out at random."""
    widths = [2 * EXTENT * radius + _MARGIN for radius in radii]
    slack = max(IMAGE_SIZE - sum(widths) - _MARGIN, 0.0)
    gaps = rng.dirichlet(np.ones(len(radii) + 1)) * slack
    edge, centres = _MARGIN / 2, []
    for width, gap in zip(widths, gaps[:-1], strict=True):
        centres.append(float(edge + gap + width / 2))
        edge += gap + width
    return centres


def _anywhere(rng: np.random.Generator, radius: float) -> float:
    """A centre near the middle line, inside the picture."""
    room = IMAGE_SIZE / 2 - EXTENT * radius - _MARGIN
    return float(IMAGE_SIZE / 2 + rng.uniform(-room, room) * 0.7)


# --- background ------------------------------------------------------------------------------------------------------


def _draw_background(rng: np.random.Generator, shape_colours: set[str]) -> Background:
    usable = [name for name in BACKGROUND_COLOURS if all(_contrasts(name, colour) for colour in shape_colours)]
    pattern = _choose(rng, ("plain", "plain", "gradient", "texture"))
    colour = _choose(rng, tuple(usable))
    vertical = bool(rng.integers(2))
    if pattern == "plain" or (pattern == "gradient" and len(usable) < 2):
        return Background("plain", (colour,))
    if pattern == "gradient":
        other = _choose(rng, tuple(name for name in usable if name != colour))
        return Background("gradient", (colour, other))
    texture = _choose(rng, TEXTURES)
    return Background(texture, (colour,), vertical=vertical and texture == "striped")


def _contrasts(background: str, colour: str) -> bool:
    difference = np.subtract(BACKGROUND_COLOURS[background], COLOURS[colour])
    return float(np.linalg.norm(difference)) >= _MIN_CONTRAST


def _choose(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]
