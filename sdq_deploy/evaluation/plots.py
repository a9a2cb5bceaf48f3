"""Line plots as SVG inside a page: sharp at any size, in the page's own colours, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["COLOURS", "Series", "line_plot"]

#: Okabe and Ito's, told apart by colour-blind readers, on light and dark paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 44


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), and the band between `low` and `high` where they are given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.logarithmic else (self.low, self.high)
        here = math.log10(max(value, self.low)) if self.logarithmic else value
        share = (here - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            return [
                factor * 10.0**power
                for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                for factor in ((1, 2, 5) if self.high / self.low < 300 else (1,))
                if self.low * 0.999 <= factor * 10.0**power <= self.high * 1.001
            ]
        rough = (self.high - self.low) / 6 or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_plot(series: Sequence[Series], x_label: str, y_label: str, logarithmic: bool = False) -> str:
    """The plot as an <svg> element, with its legend above.

    Args:
        series: one line each, coloured in their order.
        x_label, y_label: beside the axes.
        logarithmic: whether y is; values that are not positive lie at its foot.
    """
    xs = [value for line in series for value in line.x]
    ys = [value for line in series for value in (*line.y, *line.low, *line.high) if value > 0 or not logarithmic]
    if not xs or not ys:
        return ""
    bottom, top = (min(ys) / 1.2, max(ys) * 1.2) if logarithmic else (min(0.0, *ys), max(ys))
    x = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(bottom, top, _HEIGHT - _BOTTOM, _TOP, logarithmic)
    parts = [_grid(x, y, x_label, y_label)]
    parts += [_line(line, COLOURS[index % len(COLOURS)], x, y) for index, line in enumerate(series)]
    legend = "".join(
        f'<span class="key"><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{escape(line.name)}</span>'
        for index, line in enumerate(series)
    )
    label = escape(f"{y_label} by {x_label}", quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div class="legend">{legend}</div>{svg}'


def _grid(x: _Axis, y: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<text x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    parts.append(f'<text x="{(x.start + x.end) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (y.start + y.end) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _line(line: Series, colour: str, x: _Axis, y: _Axis) -> str:
    def points(values: Sequence[float]) -> list[str]:
        return [f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(line.x, values, strict=True)]

    band = ""
    if line.low and line.high:
        around = " ".join([*points(line.high), *reversed(points(line.low))])
        band = f'<polygon points="{around}" fill="{colour}" opacity="0.18"/>'
    path = f'<polyline points="{" ".join(points(line.y))}" fill="none" stroke="{colour}" stroke-width="2"/>'
    dots = "".join(
        f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="6" fill="transparent">'
        f"<title>{escape(line.name)}: {b:.4g} at {a:g}</title></circle>"
        for a, b in zip(line.x, line.y, strict=True)
    )
    return band + path + (dots if len(line.x) <= 200 else "")
