"""Folded factors reach the graphs: norms, value projections and the prologue's text keys are the checkpoint's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdq_export.checkpoint import load_checkpoint
from sdq_export.sampler import compile_sampler, make_scheduler
from sdq_export.settings import PackageSettings
from sdq_export.source import load_source
from sdq_export.writer import export_package
from tests.deploy.training.methods.runs import run_method

pytestmark = pytest.mark.slow


def test_a_smoothed_checkpoint_passes_the_exports_gate(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_method(tiny_sd, finished_run, run, {"method": "ptq", "ptq.algorithm": "smoothquant"})
    checkpoint, source = load_checkpoint(run), load_source(tiny_sd)
    norm = "mid_block.attentions.0.transformer_blocks.0.norm1.weight"
    text = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    weights = source.denoiser.state_dict()
    assert not any(torch.allclose(checkpoint.tensors[name], weights[name], rtol=0.05) for name in (norm, text))
    sampler = checkpoint.info.sampler
    plan = compile_sampler(make_scheduler(None, {"_class_name": sampler.scheduler, **sampler.config}), 3)
    result = export_package(
        source, tmp_path / "package", plan, 4.0, PackageSettings(dtype="fp32"), checkpoint=checkpoint
    )
    assert result.report.passed
    assert (tmp_path / "package" / "manifest.json").is_file()
