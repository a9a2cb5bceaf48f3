"""Whole models in one file: what diffusers' `from_single_file` makes of them, and sentences where it is silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdq_deploy.adapters.original_names import unet_name
from sdq_deploy.models import open_model
from sdq_engines.errors import SdqError
from sdq_export.conversion import configuration, convert_file, family_of_file
from sdq_export.provenance import source_info
from sdq_export.published import published
from sdq_export.single_file import FromFile, read_header
from sdq_export.source import Source, load_source
from tests.single_files import original_state, part_state, vae_state, write_file

Tiny = Callable[[str], Path]
KINDS = ["sd", "sd-inpainting", "sd2", "sdxl", "sd3"]


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """A tiny checkpoint as one file, and a folder with its configuration, tokenizers, and no weights."""
    made: dict[str, tuple[Path, str]] = {}

    def get(kind: str) -> tuple[Path, str]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = folder / "config"
            shutil.copytree(tiny(kind), config, ignore=shutil.ignore_patterns("*.safetensors"))
            made[kind] = write_file(original_state(kind, tiny(kind)), folder / "model.safetensors"), str(config)
        return made[kind]

    return get


Files = Callable[[str], tuple[Path, str]]


def converted(path: Path, config: str, folder: Path, **options: Any) -> Source:
    convert_file(path, FromFile(config=config, **options), folder)
    return load_source(folder)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, {key: tensor.float() for key, tensor in expected.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_is_what_diffusers_makes_of_the_file(files: Files, kind: str, tmp_path: Path) -> None:
    path, config = files(kind)
    source = converted(path, config, tmp_path / "model")
    index = json.loads((Path(config) / "model_index.json").read_text("utf-8"))
    without = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    pipeline = getattr(diffusers, index["_class_name"])
    expected = pipeline.from_single_file(
        str(path),
        config=config,
        local_files_only=True,
        **({"safety_checker": None} | without if kind != "sd3" else without),
    )
    for part in source.weighted_parts:
        assert_same(source.part(part).state_dict(), getattr(expected, part).state_dict())
    assert type(source.scheduler) is type(expected.scheduler)
    assert source.scheduler.config.items() >= {"num_train_timesteps": 1000}.items()
    assert family_of_file(path, FromFile(config=config)) is source.kind_of_family


def test_halves_stay_halves_and_the_licence_is_unknown(tiny_sd: Path, files: Files, tmp_path: Path) -> None:
    config = files("sd")[1]
    state = original_state("sd", tiny_sd)
    ema = {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in state.items() if "diffusion_model" in key}
    path = write_file({**state, **ema}, tmp_path / "half.safetensors", Tensor.half)
    source = converted(path, config, tmp_path / "model")
    half = {key: tensor.half() for key, tensor in load_source(tiny_sd).denoiser.state_dict().items()}
    assert_same(source.denoiser.state_dict(), half)
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 0.6 * (tiny_sd / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    notice = (tmp_path / "model/NOTICE").read_text("utf-8")
    assert "does not say under which licence" in notice
    assert "averaged (EMA) weights too; those beside them were taken" in notice
    info = source_info(source, None)
    assert info.license == "unknown"
    assert "safety checker" not in info.changes


def test_a_vae_beside_the_model(tiny: Tiny, files: Files, tmp_path: Path) -> None:
    """The model's own replaced by another file's, by the original's names with or without prefix, or diffusers'."""
    path, config = files("sd")
    other = load_source(tiny("sdxl")).vae.state_dict()
    bare = vae_state(other)
    for number, state in enumerate((bare, {f"first_stage_model.{k}": v for k, v in bare.items()}, other)):
        beside = write_file(state, tmp_path / f"{number}.safetensors")
        source = converted(path, config, tmp_path / f"model{number}", vae_from=beside)
        assert_same(source.vae.state_dict(), other)
        assert f"Its VAE is that of {number}.safetensors." in (source.folder / "NOTICE").read_text("utf-8")


def test_a_part_that_the_file_lacks(tiny_sd: Path, files: Files, tmp_path: Path) -> None:
    state = original_state("sd", tiny_sd)
    path = write_file({k: v for k, v in state.items() if "first_stage" not in k}, tmp_path / "without.safetensors")
    with pytest.raises(SdqError, match=r"without\.safetensors holds no vae") as caught:
        converted(path, files("sd")[1], tmp_path / "model")
    assert "--vae-from FILE" in caught.value.hint
    source = converted(path, str(tiny_sd), tmp_path / "taken")
    assert_same(source.vae.state_dict(), load_source(tiny_sd).vae.state_dict())
    assert f"Its vae is that of {tiny_sd}, for the file holds none." in (source.folder / "NOTICE").read_text("utf-8")


def test_stable_diffusion_3_with_and_without_t5(tiny: Tiny, files: Files, tmp_path: Path) -> None:
    """From the file, from the configuration's folder, or left out with a word, as the pipeline allows it."""
    state = original_state("sd3", tiny("sd3-t5"))
    config = str(shutil.copytree(tiny("sd3-t5"), tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))
    t5 = {f"text_encoders.t5xxl.transformer.{k}": v for k, v in part_state(tiny("sd3-t5") / "text_encoder_3").items()}
    expected = load_source(tiny("sd3-t5")).part("text_encoder_3").state_dict()
    whole = converted(write_file(state | t5, tmp_path / "whole.safetensors"), config, tmp_path / "whole")
    taken = converted(write_file(state, tmp_path / "less.safetensors"), str(tiny("sd3-t5")), tmp_path / "taken")
    for source in (whole, taken):
        assert_same(source.part("text_encoder_3").state_dict(), expected)
    without = converted(tmp_path / "less.safetensors", config, tmp_path / "without")
    assert without.weighted_parts == ["transformer", "vae", "text_encoder", "text_encoder_2"]
    assert "without its third text encoder" in (without.folder / "NOTICE").read_text("utf-8")


def change_lacking(state: dict[str, Tensor]) -> None:
    del state["model.diffusion_model.middle_block.0.in_layers.2.weight"]


def change_more(state: dict[str, Tensor]) -> None:
    state["model.diffusion_model.output_blocks.9.0.in_layers.2.weight"] = torch.zeros(2)


def change_shape(state: dict[str, Tensor]) -> None:
    state["model.diffusion_model.out.2.bias"] = torch.zeros(8)


def change_encoder(state: dict[str, Tensor]) -> None:
    del state["cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"]


def change_layers(state: dict[str, Tensor]) -> None:
    name = "cond_stage_model.transformer.text_model.encoder.layers.{}.mlp.fc1.bias"
    state[name.format(2)] = state[name.format(1)].clone()


def change_vae(state: dict[str, Tensor]) -> None:
    state["first_stage_model.decoder.up.4.block.0.conv1.weight"] = torch.zeros(2)


def change_fp8(state: dict[str, Tensor]) -> None:
    key = "model.diffusion_model.out.2.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_lacking, r"The unet of .* lacks mid_block\.resnets\.0\.conv1\.weight"),
        (change_more, r"The unet of .* no place for model\.diffusion_model\.output_blocks\.9"),
        (change_shape, r"The unet of .*conv_out\.bias is \[8\], its configuration wants \[4\]"),
        (change_encoder, r"The text_encoder of .* lacks encoder\.layers\.1\.mlp\.fc1\.weight"),
        (change_layers, r"The text_encoder of .* has 3 layers, its configuration 2"),
        (change_vae, r"The vae of .* no place for first_stage_model\.decoder\.up\.4"),
        (change_fp8, r"stores 1 of its .* tensors as F8_E4M3.*model\.diffusion_model\.out\.2\.weight"),
    ],
)
def test_what_diffusers_would_gloss_over_is_named(
    tiny_sd: Path, files: Files, change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    state = original_state("sd", tiny_sd)
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SdqError, match=said):
        converted(tmp_path / "model.safetensors", files("sd")[1], tmp_path / "model")


def test_files_that_are_no_whole_model(tiny_sd: Path, files: Files, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    (tmp_path / "cut.safetensors").write_bytes((tiny_sd / "vae/diffusion_pytorch_model.safetensors").read_bytes()[:99])
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    part = tiny_sd / "unet/diffusion_pytorch_model.safetensors"
    for path, said in [
        (tmp_path / "model.ckpt", "is a pickle"),
        (tmp_path / "cut.safetensors", "cannot be read as a .safetensors file"),
        (tmp_path / "lora.safetensors", "is an adapter, not a model"),
        (part, "is not a whole Stable Diffusion model"),
    ]:
        with pytest.raises(SdqError, match=said):
            open_model(str(path))
    with pytest.raises(SdqError, match="is no single file"):
        open_model(str(tiny_sd), from_file=FromFile(config=files("sd")[1]))
    with pytest.raises(SdqError, match="is neither"):
        open_model(str(files("sd")[0]), from_file=FromFile(config=str(tmp_path / "nowhere")))


def test_published_configurations_need_tokenizers_alone(tiny_sd: Path, files: Files, tmp_path: Path) -> None:
    """Without --config the architecture is known from the file; the vocabulary, which no file holds, is asked for."""
    path = files("sd")[0]
    with pytest.raises(SdqError, match=r"holds no tokenizer") as caught:
        open_model(str(path))
    assert "--config FOLDER" in caught.value.hint
    shutil.copytree(tiny_sd / "tokenizer", tmp_path / "mine/tokenizer")
    with configuration(read_header(path), FromFile(config=str(tmp_path / "mine"))) as folder:
        source = Source(folder, "m", None)
        assert source.skeleton.config.block_out_channels == [320, 640, 1280, 1280]
        assert source.part("tokenizer").vocab_size == load_source(tiny_sd).part("tokenizer").vocab_size
        assert source.scheduler.config.beta_schedule == "scaled_linear"
    with pytest.raises(SdqError, match="does not fit its configuration"):
        converted(path, str(tmp_path / "mine"), tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SdqError, match="has no tokenizer/"):
        converted(path, str(tmp_path / "empty"), tmp_path / "model")


@pytest.mark.parametrize("family", ["sd14", "sd21", "sdxl"])
def test_the_original_names_of_real_unets(family: str) -> None:
    """diffusers maps each name back to where it came from, for the published architectures."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {key: value for key, value in published(family)["components"]["unet"].items() if key != "_class_name"}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    names = {}
    for key, tensor in unet.state_dict().items():
        path, _, ending = key.rpartition(".")
        original = unet_name(path, unet)
        assert original is not None, key
        names[f"model.diffusion_model.{original}.{ending}"] = (key, tensor)
    back = convert_ldm_unet_checkpoint({name: key for name, (key, _) in names.items()}, dict(unet.config))
    assert back == {key: key for key in unet.state_dict()}


def test_the_cache_is_keyed_by_all_that_a_conversion_depends_on(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDQ_CACHE_DIR", str(tmp_path / "cache"))
    path, config = files("sd")
    first = open_model(str(path), from_file=FromFile(config=config))
    assert (first.model, first.folder.parent) == (str(path), tmp_path / "cache/models")
    again = Path(shutil.copy(path, tmp_path / "renamed.safetensors"))
    assert open_model(str(again), from_file=FromFile(config=config)).folder == first.folder
    other = Path(shutil.copytree(config, tmp_path / "other"))
    scheduler = other / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text("utf-8")), "beta_end": 0.013}), "utf-8")
    assert open_model(str(path), from_file=FromFile(config=str(other))).scheduler.config.beta_end == 0.013
    assert len(list((tmp_path / "cache/models").iterdir())) == 2
