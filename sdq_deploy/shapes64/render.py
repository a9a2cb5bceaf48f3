"""Drawing a scene: 64x64 RGB, anti-aliased by drawing at four times the size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sdq_deploy.shapes64.objects import Background, SceneObject
from sdq_deploy.shapes64.scenes import BACKGROUND_COLOURS, COLOURS, IMAGE_SIZE, Scene

__all__ = ["render"]

_SUPERSAMPLING = 4
_TEXTURE_CONTRAST = 22.0  # grey levels between the two tones of a textured background

_HOLE = 0.5  # of a ring, in radii

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
    if item.kind in ("circle", "ring"):
        draw.ellipse(_on_canvas(item, ((-1.0, -1.0), (1.0, 1.0))), fill=255)
        if item.kind == "ring":
            draw.ellipse(_on_canvas(item, ((-_HOLE, -_HOLE), (_HOLE, _HOLE))), fill=0)
    else:
        draw.polygon(_on_canvas(item, _OUTLINES[item.kind]), fill=255)
    return np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255.0


def _on_canvas(item: SceneObject, points: Sequence[_Point]) -> list[_Point]:
    return [
        ((item.x + item.radius * x) * _SUPERSAMPLING, (item.y + item.radius * y) * _SUPERSAMPLING) for x, y in points
    ]


def _cross(arm: float = 0.37, reach: float = 1.0) -> list[_Point]:
    a, r = arm, reach
    return [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]


# Corners in units of the radius, y downwards; none lies beyond scenes.EXTENT from the centre.
_OUTLINES: dict[str, list[_Point]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.05, 0.86), (-1.05, 0.86)],
    "cross": _cross(),
}


def _background(background: Background) -> npt.NDArray[np.float32]:
    colours: list[npt.NDArray[np.float32]] = [
        np.asarray(BACKGROUND_COLOURS[name], dtype=np.float32) for name in background.colours
    ]
    if background.pattern == "plain":
        return np.broadcast_to(colours[0], (IMAGE_SIZE, IMAGE_SIZE, 3))
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5
    if background.pattern == "gradient":
        ramp = (y / IMAGE_SIZE)[..., None]
        blend: npt.NDArray[np.float32] = colours[0] * (1 - ramp) + colours[1] * ramp
        return blend
    # Towards mid-grey, so that neither white nor black loses its texture to clipping.
    direction = -1.0 if colours[0].mean() > 128 else 1.0
    tone = _texture(background, x, y)[..., None] * np.float32(direction * _TEXTURE_CONTRAST)
    picture: npt.NDArray[np.float32] = np.clip(colours[0] + tone, 0, 255)
    return picture


def _texture(background: Background, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The pattern in 0..1, float32 [64, 64], in cells of 8 pixels with edges a pixel soft."""
    a, b = _wave(x), _wave(y)
    if background.pattern == "striped":
        return a if background.vertical else b
    either: npt.NDArray[np.float32] = a + b - 2 * a * b
    return either


def _wave(position: npt.NDArray[np.float32], period: float = 16.0) -> npt.NDArray[np.float32]:
    wave: npt.NDArray[np.float32] = np.clip(0.5 + 4.0 * np.sin(position * (2 * math.pi / period)), 0.0, 1.0)
    return wave.astype(np.float32)
