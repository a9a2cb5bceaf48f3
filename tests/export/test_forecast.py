"""What an export will take: reckoned from configurations alone, said, and held against the machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
from torch import nn

from sdq_deploy import random_checkpoints
from sdq_engines.errors import SdqError
from sdq_export.forecast import ExportForecast, forecast_export
from sdq_export.parity.budget import choose_gate
from sdq_export.source import Source, load_source

GATE = choose_gate("auto", 20, (4, 64, 64), 860_000_000, True)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Stable Diffusion v1-4 without its weights: files of their size that hold nothing and take no disk."""
    folder, tree = tmp_path_factory.mktemp("published"), random_checkpoints.published("sd14")
    parts = {name: random_checkpoints.make_component(config) for name, config in tree["components"].items()}
    getattr(diffusers, tree["pipeline"])(**parts, **tree["settings"]).save_config(folder)
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            part.save_pretrained(folder / name)
            continue
        (part.config.save_pretrained if hasattr(part.config, "save_pretrained") else part.save_config)(folder / name)
        file = folder / name / "model.safetensors"
        file.touch()
        os.truncate(file, 2 * sum(each.numel() for each in part.parameters()))
    return load_source(folder)


def test_a_published_model_is_reckoned_without_its_weights(published: Source) -> None:
    found = forecast_export(published, GATE, True, "cpu", ["openvino"])
    assert found.parameters == pytest.approx(1_066e6, rel=0.01)
    assert not found.is_small
    assert 4 * 860e6 < found.memory_bytes < 9e9
    assert 1e9 < found.disk_bytes < 4e9
    assert found.seconds > 1
    assert found.calls == 18
    assert f"{found.memory_bytes / 1e9:.1f} GB of memory" in found.sentence


def test_what_cannot_fit_is_one_sentence(published: Source, tmp_path: Path) -> None:
    possible = ExportForecast(10**9, 10**6, "the denoiser", 10**6, 60.0, 18)
    possible.require(tmp_path)
    with pytest.raises(SdqError, match=r"about 1000000\.0 GB of memory \(in the denoiser\); .* are available") as no:
        replace(possible, memory_bytes=10**15).require(tmp_path)
    assert "--force" in no.value.hint
    with pytest.raises(SdqError, match=r"needs about 1000000\.0 GB on the disk of .* are free") as no:
        replace(possible, disk_bytes=10**15).require(tmp_path)
    assert "--force" in no.value.hint


def test_a_small_model_is_not_reckoned(source: Source) -> None:
    assert forecast_export(source, GATE, False, "cpu").is_small
