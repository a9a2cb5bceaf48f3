"""What may be loaded, and what is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdq_engines.errors import SdqError
from sdq_export.source import load_source


def test_loads_every_component(tiny_sd: Path) -> None:
    source = load_source(tiny_sd)
    assert source.denoiser.dtype == source.vae.dtype == source.part("text_encoder").dtype == torch.float32
    assert not source.denoiser.training
    assert type(source.scheduler).__name__ == "DDIMScheduler"
    assert source.part("tokenizer")("a red circle").input_ids[0] == source.part("tokenizer").bos_token_id
    assert len(source.sha256) == 64


def test_the_hash_is_of_the_weights(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    assert load_source(copy).sha256 == load_source(tiny_sd).sha256
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert load_source(copy).sha256 != load_source(tiny_sd).sha256


def test_an_fp16_variant_loads(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert torch.equal(load_source(copy).denoiser.conv_in.weight, load_source(tiny_sd).denoiser.conv_in.weight)


def test_missing() -> None:
    with pytest.raises(SdqError, match="does not exist"):
        load_source("./no-such-model")


def test_not_on_the_hub() -> None:
    with pytest.raises(SdqError, match="neither a local folder nor to be had from the hub"):
        load_source("no-such-owner/no-such-model")


def test_no_diffusers_folder(tmp_path: Path) -> None:
    with pytest.raises(SdqError, match=r"no model_index\.json"):
        load_source(tmp_path)


def test_another_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(SdqError, match="FluxPipeline"):
        load_source(copy)


def test_a_pickle_is_refused_with_the_reason(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SdqError, match=r"pickle.*can run any code"):
        load_source(copy)


def test_broken_weights_are_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SdqError, match="cannot be loaded"):
        _ = load_source(copy).denoiser
