"""What may be loaded, and what is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq_deploy.models import resolve_model
from sdq_engines.errors import SdqError
from sdq_export.provenance import what_is_missing
from sdq_export.source import load_source
from tests.tiny import write_tiny_sd, write_tiny_sd3, write_tiny_sdxl


@pytest.fixture(scope="module", params=[write_tiny_sd, write_tiny_sdxl, partial(write_tiny_sd3, t5=True)])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one, two and three text encoders."""
    folder: Path = request.param(tmp_path_factory.mktemp("checkpoint"))
    return folder


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


def test_an_fp16_variant_loads(checkpoint: Path, tmp_path: Path) -> None:
    """Every part, whichever its precision, and mixed ones."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    plain = load_source(checkpoint)
    for file in copy.rglob("*.safetensors"):
        if file.parent.name != "vae":
            save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    loaded = load_source(copy)
    for part in plain.weighted_parts:
        wanted = plain.part(part).state_dict()
        for name, tensor in loaded.part(part).state_dict().items():
            assert tensor.dtype == wanted[name].dtype
            assert torch.equal(tensor, wanted[name] if part == "vae" else wanted[name].half().to(tensor.dtype)), name


def test_the_plain_weights_win_over_the_variant(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    for file in list(copy.rglob("*.safetensors")):
        zeros = {name: torch.zeros_like(tensor).half() for name, tensor in load_file(file).items()}
        save_file(zeros, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
    assert load_source(copy).sha256 == load_source(tiny_sd).sha256
    assert torch.equal(load_source(copy).denoiser.conv_in.weight, load_source(tiny_sd).denoiser.conv_in.weight)


def test_a_hub_id_loads_from_the_cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier download left, in the layout of huggingface_hub; nothing of it is asked from the network."""
    cached = tmp_path / "models--someone--model"
    shutil.copytree(checkpoint, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = load_source("someone/model")
    assert source.sha256 == load_source(checkpoint).sha256
    for part in source.family.parts:
        assert source.part(part) is source.part(part)


def test_of_a_hub_id_all_parts_that_the_index_names_are_fetched(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also Stable Diffusion 3's third text encoder, which may be left out of a download by hand."""
    hub, cache = tiny("sd3-t5"), tmp_path / "cache"

    def snapshot_download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        for file in (path.relative_to(hub) for path in hub.rglob("*") if path.is_file()):
            if any(fnmatch(file.as_posix(), pattern) for pattern in allow_patterns):
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert "text_encoder_3" in load_source("someone/model").family.parts


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


def test_a_pickle_is_refused_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    for part in load_source(checkpoint).weighted_parts:
        copy = Path(shutil.copytree(checkpoint, tmp_path / part))
        for weights in (copy / part).glob("*.safetensors"):
            weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(SdqError, match=rf"The {part} of .*pickle.*can run any code"):
            load_source(copy)


def test_a_damaged_tokenizer_is_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(SdqError, match=r"has no folder tokenizer/, without which no prompt can be read"):
        load_source(copy).part("tokenizer")


def test_broken_weights_are_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SdqError, match="cannot be loaded"):
        _ = load_source(copy).denoiser


def test_only_a_checkpoint_with_a_safety_checker_is_said_to_lose_it(tiny_sd: Path) -> None:
    assert "safety checker is not part of the package" in (what_is_missing(load_source(tiny_sd)) or "")
    assert what_is_missing(load_source(resolve_model("shapes-64"))) is None
