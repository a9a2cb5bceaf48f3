"""A training reads prompts as its package will: chunks, skipped layers and textual inversions, recorded for export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdq_deploy.evaluation.candidates import open_candidates
from sdq_deploy.evaluation.reading import read_alike
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.resolve import resolve_settings
from sdq_deploy.training.run import read_settings, run_training
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import load_checkpoint, load_embeddings
from sdq_export.embeddings import parse_embedding
from sdq_export.source import load_source
from sdq_export.text_settings import TextSettings
from tests.deploy.training.helpers import small_settings
from tests.tiny import MAX_LENGTH, WIDTH


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_prompts_mean_is_recorded_and_followed(
    tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(
        {"emb_params": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))}, tmp_path / "s.safetensors"
    )
    given = f"<s>={tmp_path / 's.safetensors'}"
    changes = {"text.clip_skip": 1, "text.prompt_chunks": 2, "fit.max_train_steps": 0, "sensitivity.top_k": 1}
    settings = small_settings(tiny_sd, tmp_path / "run", {**changes, "collect.num_prompts": 2})
    prompts = ("a red <s> circle", "red BREAK <s>", "a circle", "long " * 10)
    settings = replace(settings, prompts=prompts, embeddings=(parse_embedding(given),))
    run_training(settings, cpu=True, quiet=True)

    assert "1 prompt(s) are longer than the model takes and were cut, the first 'long long" in caplog.text
    told = load_source(tiny_sd).with_text(TextSettings(prompt_chunks=2, clip_skip=1), [parse_embedding(given)])
    data = load_split(tmp_path / "run" / "dataset", "training")
    wanted = told.family.encode_prompts(list(prompts[:2])).tensors["text_embeddings"]
    found = data.conditioning[[0, 1]].tensors["text_embeddings"]
    assert found.shape == (2, 2 * MAX_LENGTH, WIDTH)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    empty = told.family.encode_prompts([None]).tensors["text_embeddings"]
    torch.testing.assert_close(data.empty.tensors["text_embeddings"], empty, rtol=1e-4, atol=1e-5)

    assert load_checkpoint(tmp_path / "run").info.text == told.text
    (kept,) = load_embeddings(tmp_path / "run")
    assert kept == told.embeddings[0]
    assert torch.equal(kept.vectors[""], told.embeddings[0].vectors[""])
    sha256 = told.embeddings[0].sha256
    assert read_settings(tmp_path / "run")["embeddings"] == [{"name": "<s>", "sha256": sha256}]

    # the run has the vectors, so it goes on anywhere without their file
    (tmp_path / "s.safetensors").unlink()
    moved = Path(shutil.copytree(tmp_path / "run", tmp_path / "moved"))
    resumed = resolve_settings(str(tiny_sd), moved, resume=True)
    assert resumed.embeddings == told.embeddings
    assert run_training(resumed, resume=True, cpu=True, quiet=True) == []
    (moved / "embeddings.safetensors").unlink()
    with pytest.raises(SdqError, match=r"before it had copied its embeddings \(<s>\)") as refused:
        resolve_settings(str(tiny_sd), moved, resume=True)
    assert "--embedding NAME=FILE" in refused.value.hint

    # an evaluation reads prompts alike for the model that the run is held against
    candidates = open_candidates([str(tmp_path / "run")])
    (model,) = open_candidates([str(tiny_sd)])
    _, reference = read_alike(candidates, model)
    assert reference.text == told.text
    assert reference.identity != model.identity
    with pytest.raises(SdqError, match="run and other do not read prompts alike: 2 chunk"):
        read_alike([*candidates, replace(candidates[0], name="other", text=TextSettings())], model)
