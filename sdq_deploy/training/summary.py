"""A finished training in two sentences, for people."""

from __future__ import annotations

from typing import Any

from sdq_export.checkpoint import CheckpointInfo

__all__ = ["summary_of"]


def summary_of(info: CheckpointInfo) -> str:
    """How much is quantized, and how near to the teacher's the held-out trajectory is."""
    return (
        f"{info.spec.precision}: {len(info.spec.weights)} weights, {len(info.spec.activations)} activations quantized. "
        + _trajectory(info.notes)
    )


def _trajectory(notes: dict[str, Any]) -> str:
    snr = notes["trajectory_snr_db"]
    if notes.get("method") == "ptq":
        return f"Held-out trajectory {snr['best']:.2f} dB, without training."
    return (
        f"Held-out trajectory {snr['start']:.2f} dB before training, {snr['best']:.2f} dB at the best state "
        f"(step {notes['best_step']})."
    )
