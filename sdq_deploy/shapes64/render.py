"""Drawing a scene: 64x64 RGB, anti-aliased by drawing at four times the size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from sdq_deploy.shapes64.scenes import BACKGROUND_COLOURS, COLOURS, IMAGE_SIZE, Background, Scene, SceneObject

__all__ = ["render"]

_SUPERSAMPLING = 4
_TEXTURE_CONTRAST = 22.0  # grey levels between the two tones of a textured background

_Point = tuple[float, float]


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture of a scene, uint8 [64, 64, 3]."""
    picture = _background(scene.background)
    for item in scene.objects:
        coverage = _coverage(item)
        picture = picture * (1.0 - coverage) + np.asarray(COLOURS[item.colour], dtype=np.float32) * coverage
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _coverage(item: SceneObject) -> npt.NDArray[np.float32]:
    """How much of each pixel the object covers, float32 [64, 64, 1] in 0..1."""
    mask = Image.new("L", (IMAGE_SIZE * _SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(mask)
    if item.kind == "circle":
        corners = ((-1.0, -1.0), (1.0, 1.0))
        draw.ellipse(_on_canvas(item, corners), fill=255)
    else:
        draw.polygon(_on_canvas(item, _OUTLINES[item.kind]), fill=255)
    return np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255.0


def _on_canvas(item: SceneObject, points: Sequence[_Point]) -> list[_Point]:
    return [
        ((item.x + item.radius * x) * _SUPERSAMPLING, (item.y + item.radius * y) * _SUPERSAMPLING) for x, y in points
    ]


def _star() -> list[_Point]:
    corners = []
    for i in range(10):
        angle, radius = math.pi * (i / 5 - 0.5), 1.12 if i % 2 == 0 else 0.52
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _cross(arm: float = 0.34, reach: float = 1.0) -> list[_Point]:
    a, r = arm, reach
    return [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]


# Corners in units of the radius, y downwards; none lies beyond scenes.EXTENT from the centre.
_OUTLINES: dict[str, list[_Point]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.06, 0.86), (-1.06, 0.86)],
    "star": _star(),
    "cross": _cross(),
}


def _background(background: Background) -> npt.NDArray[np.float32]:
    colours = [np.asarray(BACKGROUND_COLOURS[name], dtype=np.float32) for name in background.colours]
    if background.pattern == "plain":
        return np.broadcast_to(colours[0], (IMAGE_SIZE, IMAGE_SIZE, 3))
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5
    if background.pattern == "gradient":
        along = (x - 32) * math.cos(background.angle) + (y - 32) * math.sin(background.angle)
        ramp = (along / IMAGE_SIZE + 0.5)[..., None]
        return colours[0] * (1 - ramp) + colours[1] * ramp
    # Towards mid-grey, so that neither white nor black loses its texture to clipping.
    direction = -1.0 if colours[0].mean() > 128 else 1.0
    tone = _texture(background, x, y)[..., None] * np.float32(direction * _TEXTURE_CONTRAST)
    return np.clip(colours[0] + tone, 0, 255)


def _texture(background: Background, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The pattern in 0..1, float32 [64, 64]; all edges are a pixel soft."""
    if background.pattern == "striped":
        along = x if background.angle % math.pi < 0.1 else y
        return _wave(along + background.phase)
    if background.pattern == "checkered":
        a, b = _wave(x + background.phase), _wave(y + background.phase)
        return a + b - 2 * a * b
    grain = np.random.Generator(np.random.PCG64(background.grain)).integers(0, 256, (8, 8), dtype=np.uint8)
    cloud = Image.fromarray(grain).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(cloud.filter(ImageFilter.GaussianBlur(3)), dtype=np.float32) / 255.0


def _wave(position: npt.NDArray[np.float32], period: float = 16.0) -> npt.NDArray[np.float32]:
    return np.clip(0.5 + 4.0 * np.sin(position * (2 * math.pi / period)), 0.0, 1.0).astype(np.float32)
