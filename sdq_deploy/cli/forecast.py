"""How `sdq-deploy train --dry-run` shows a forecast."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from sdq_deploy.cli.shared import print_json
from sdq_deploy.display.consoles import console

if TYPE_CHECKING:
    from sdq_deploy.training.forecast import Forecast

__all__ = ["print_forecast"]


def print_forecast(found: Forecast, as_json: bool) -> None:
    """A table for people, or JSON for machines."""
    if as_json:
        print_json({**asdict(found), "memory_bytes": found.memory_bytes, "seconds_per_step": found.seconds_per_step})
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(found):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    console.print("Nothing was written. Without --dry-run the training begins.")


def _rows(found: Forecast) -> list[tuple[str, str]]:
    weights = ", ".join(f"{count} of {title}" for title, count in found.quantized_weights.items())
    rows = [
        (
            "denoiser",
            f"{found.parameters / 1e6:,.1f} M parameters, {100 * found.quantized_share:.1f} % to be quantized",
        ),
        ("weights", f"{weights}; in floating point: {', '.join(found.kept) or 'none'}"),
        (
            "activations",
            f"{found.activation_sites} of {', '.join(found.activation_formats) or 'none'}, "
            f"{found.scales_per_site} scale(s) each",
        ),
    ]
    if found.sensitive:
        total = sum(found.quantized_weights.values())
        rows.append(("sensitive layers", f"{found.sensitive} of {total}, chosen by measurement after calibration"))
    rows.append(
        (
            "serial dataset",
            f"{found.latents:,} latents, {_bytes(found.dataset_bytes)} on disk, read batch by batch: "
            f"{_bytes(found.dataset_memory_bytes)} of the host's memory",
        )
    )
    if found.train_steps:
        state, frozen = _bytes(found.trainable_bytes), _bytes(found.frozen_bytes)
        rows += [
            ("training", f"{found.method}, {found.train_steps:,} steps of batch {found.batch_size}"),
            (
                "memory, one process",
                f"about {_bytes(found.memory_bytes)}: {state} that learns (with gradients, and "
                f"{_bytes(found.optimizer_bytes)} of moments in {found.optimizer_state}), {frozen} that does not "
                f"(the teacher {_bytes(found.teacher_bytes)}), {_bytes(found.activation_bytes)} of activations",
            ),
            (
                "time, one device",
                f"{found.seconds_per_step:.2g} s a step, "
                f"{_minutes(found.seconds_per_step * found.train_steps)} in all, "
                f"{_minutes(found.collect_seconds)} to collect, "
                f"at {found.assumed_tflops:.0f} TFLOP/s ({found.flops_per_step / 1e12:.3g} TFLOP a step)",
            ),
        ]
    return rows


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
