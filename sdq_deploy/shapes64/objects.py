"""What a scene is made of: shapes, and what lies behind them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TEXTURES", "Background", "SceneObject"]

TEXTURES = ("striped", "checkered")


@dataclass(frozen=True)
class SceneObject:
    """One shape: `x`, `y` its centre and `radius` its size in pixels; `size` None where the caption does not say."""

    kind: str
    colour: str
    size: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """`pattern` is plain, gradient (from `colours[0]` at the top to `colours[1]`) or one of `TEXTURES`.

    Stripes run across, or down where `vertical`.
    """

    pattern: str
    colours: tuple[str, ...]
    vertical: bool = False
