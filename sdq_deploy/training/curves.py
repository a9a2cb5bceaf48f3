"""The curves of a training as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdq_engines.files import atomic_write

__all__ = ["draw_curves"]

#: Title -> the log's fields in that panel.
PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "loss_output", "loss_ild"),
    "held-out trajectory, dB": ("trajectory_snr_db",),
    "learning rate": ("lr_weights", "lr_scales"),
    "scales against their start": ("weight_scale_ratio", "activation_scale_ratio"),
    "share of followed weights": ("oscillating", "frozen"),
    "gradient norm": ("gradient_norm",),
}

#: Fields whose range spans decades.
LOGARITHMIC = ("loss", "learning rate", "gradient norm")


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the log's records into `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None)
        axes.set_title(title)
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend(fontsize="small")
        if title in LOGARITHMIC and any((line.get_ydata() > 0).all() for line in axes.lines):
            axes.set_yscale("log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
