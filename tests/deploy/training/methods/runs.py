"""One run of a method in this process, on the serial dataset of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.run import run_training
from sdq_deploy.training.trajectory import trajectory_snr
from sdq_export.checkpoint import QuantizedCheckpoint, load_checkpoint
from sdq_export.reference import build_reference
from sdq_export.source import load_source
from tests.deploy.training.helpers import small_context, small_settings


def run_method(model: Path, finished: Path, out: Path, overrides: dict[str, Any]) -> QuantizedCheckpoint:
    """Run to the end and read the checkpoint back."""
    run_training(small_settings(model, out, overrides), cpu=True, quiet=True, dataset=finished)
    return load_checkpoint(out)


def status_of(out: Path) -> dict[str, Any]:
    """What run.json says."""
    status: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return status


def snr_of(model: Path, out: Path, checkpoint: QuantizedCheckpoint) -> float:
    """Held-out trajectory SNR in dB of the reference that export builds from the checkpoint alone."""
    context = small_context(model, out)
    original = load_source(model).denoiser
    reference = build_reference(original, checkpoint.spec, checkpoint.tensors, context.timesteps)
    with torch.no_grad():
        return trajectory_snr(context, reference, load_split(out / "dataset", "validation"))
