"""Whatever is wrong with a checkpoint is one sentence that names the part, the file, the key: never a library's
exception, and never random numbers in the place of what is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq_engines.errors import SdqError
from sdq_export.configs import check_types
from sdq_export.sampler import compile_sampler
from sdq_export.source import load_source
from tests.export.test_repairs import edit

Tiny = Callable[[str], Path]
FILES = {
    "model_index.json": ("delete", "empty", "half", "list"),
    "scheduler/scheduler_config.json": ("delete", "empty", "half", "list"),
    "tokenizer/tokenizer.json": ("delete", "empty", "half", "list", "object"),
    "tokenizer/tokenizer_config.json": ("empty", "half", "list"),
    "text_encoder/config.json": ("delete", "empty", "half", "list", "object"),
    "text_encoder/model.safetensors": ("delete", "empty", "half"),
    "unet/config.json": ("delete", "empty", "half", "list", "object"),
    "unet/diffusion_pytorch_model.safetensors": ("delete", "empty", "half"),
    "vae/config.json": ("delete", "empty", "half", "list", "object"),
    "vae/diffusion_pytorch_model.safetensors": ("delete", "empty", "half"),
}


@pytest.fixture(scope="module")
def copied(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny("sd"), tmp_path_factory.mktemp("damaged") / "model"))


@pytest.fixture
def folder(copied: Path, tiny: Tiny) -> Iterator[Path]:
    """A checkpoint to damage; what a test has changed or removed is put back."""
    yield copied
    for file in (path for path in tiny("sd").rglob("*") if path.is_file()):
        now = copied / file.relative_to(tiny("sd"))
        now.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, now)


def use(folder: Path) -> None:
    """All that training and export ask of a checkpoint before they begin."""
    source = load_source(folder)
    source.family.check()
    compile_sampler(source.scheduler, 2)
    for encoder in source.family.text_encoders:
        encoder.info()
    for part in source.family.parts:
        source.part(part)


def refused(folder: Path) -> str:
    with pytest.raises(SdqError) as error:
        use(folder)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize(("name", "damage"), [(name, each) for name, damages in FILES.items() for each in damages])
def test_a_damaged_file_is_named(name: str, damage: str, folder: Path) -> None:
    file = folder / name
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        made = {"empty": b"", "half": content[: len(content) // 2], "list": b"[]", "object": b"{}"}
        file.write_bytes(made[damage])
    said = refused(folder)
    assert name.split("/")[0] in said
    assert str(folder) in said


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("model_index.json", {"scheduler": ...}, "names no scheduler"),
        ("model_index.json", {"scheduler": ["diffusers", "NoSuchScheduler"]}, "NoSuchScheduler"),
        ("model_index.json", {"scheduler": ["mine", "DDIMScheduler"]}, "mine.DDIMScheduler"),
        ("model_index.json", {"_class_name": ...}, "names no pipeline"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text_encoder"),
        ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "text_encoder .* transformers.BertModel"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, "WithProjection"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae .* diffusers.AutoencoderTiny; supported"),
        ("model_index.json", {"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "AsymmetricAutoencoderKL"),
        ("model_index.json", {"unet": ["diffusers", "UNetMotionModel"]}, "unet .* diffusers.UNetMotionModel"),
        ("model_index.json", {"unet": ["diffusers_modules.local.net", "Net"]}, "diffusers_modules.local.net.Net"),
        ("model_index.json", {"tokenizer": ["transformers", "BertTokenizer"]}, "tokenizer .* transformers.BertTokeniz"),
        ("text_encoder/config.json", {"model_type": "bert"}, "text_encoder/config.json .* model_type = 'bert'"),
        ("text_encoder/config.json", {"hidden_size": "32"}, "text_encoder .* 'hidden_size'.*'32'"),
        ("text_encoder/config.json", {"eos_token_id": None}, "text_encoder"),
        ("text_encoder/config.json", {"vocab_size": 500}, "token_embedding.* has shape .*500"),
        ("unet/config.json", {"sample_size": "64"}, 'unet/config.json .* sample_size = "64"'),
        (
            "unet/config.json",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "unet/config.json .* quantized",
        ),
        ("unet/config.json", {"sample_size": ...}, "unet/config.json .* sample_size = None"),
        ("unet/config.json", {"cross_attention_dim": "32"}, 'cross_attention_dim = "32"'),
        ("unet/config.json", {"cross_attention_dim": 64}, "embeddings of 32 channels; the unet takes 64"),
        ("unet/config.json", {"block_out_channels": [32, "32", 64]}, "block_out_channels = "),
        ("vae/config.json", {"scaling_factor": "0.18"}, "vae/config.json .* scaling_factor"),
        ("vae/config.json", {"latent_channels": 8}, "latents of 8 channels|has shape"),
        ("scheduler/scheduler_config.json", {"beta_end": "0.012"}, "scheduler_config.json .* beta_end"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}, "scheduler_config.json.* steep"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 100}, "model_max_length = 100; .* 16 positions"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "names no pad_token"),
    ],
)
def test_a_wrong_setting_is_named(name: str, changes: dict[str, Any], words: str, folder: Path) -> None:
    edit(folder / name, **changes)
    with pytest.raises(SdqError, match=words):
        use(folder)


WEIGHTS = {"text_encoder": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
KEYS = {"text_encoder": "encoder.layers.1.mlp.fc1.weight", "unet": "mid_block.resnets.0.conv1.weight"}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched", "nan", "infinity"])
def test_other_tensors_than_the_class_asks_for_are_named(part: str, damage: str, folder: Path) -> None:
    """One of transformers', one of diffusers': a tensor that is missing would be filled with random numbers."""
    file, key = folder / part / WEIGHTS[part], KEYS[part]
    tensors = load_file(file)
    if damage == "missing":
        del tensors[key]
    elif damage == "unexpected":
        tensors[f"{key}_extra"] = torch.ones(2)
    elif damage == "mismatched":
        tensors[key] = tensors[key][:3].clone()
    else:
        tensors[key].view(-1)[5] = float("nan") if damage == "nan" else float("-inf")
    save_file(tensors, file, {"format": "pt"})
    said = refused(folder)
    words = {
        "missing": f"The {part} of {folder} lacks tensors that it needs: {key}.",
        "unexpected": f"does not take: {key}_extra.",
        "mismatched": f"The tensor {key} of the {part} of {folder} has shape [3, ",
        "nan": f"The tensor {key} in {part}/{WEIGHTS[part]} of {folder} holds a NaN or an infinity.",
    }
    assert words["nan" if damage == "infinity" else damage] in said


def test_what_the_class_declares_ignorable_may_be_there(folder: Path) -> None:
    """As in every checkpoint of before 2023, under its old names too."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, file, {"format": "pt"})
    use(folder)


def test_a_tokenizer_that_is_not_there_is_named_with_what_to_copy(folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    assert "The folder tokenizer/ of" in (said := refused(folder))
    assert "lacks the tokenizer's words: tokenizer.json" in said
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(SdqError, match="has no folder tokenizer/, without which no prompt can be read") as error:
        use(folder)
    assert "Copy tokenizer/ from the checkpoint" in error.value.hint


def test_a_tokenizer_that_says_no_length_pads_to_the_encoders(folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=...)
    source = load_source(folder)
    assert source.part("tokenizer").model_max_length > 10**20
    assert source.family.text_encoders[0].length == 16
    assert source.family.text_encoders[0].info().max_length == 16
    assert source.family.encode_prompts(["a red circle"]).tensors["text_embeddings"].shape[1] == 16


def test_of_two_encoders_the_first_tokenizer_says_stable_diffusion_3s_length(tiny: Tiny, tmp_path: Path) -> None:
    for kind in ("sd3", "sdxl"):
        folder = Path(shutil.copytree(tiny(kind), tmp_path / kind))
        edit(folder / "tokenizer_2/tokenizer_config.json", model_max_length=12)
        source = load_source(folder)
        if kind == "sd3":
            assert [encoder.length for encoder in source.family.text_encoders] == [16, 16]
        else:
            with pytest.raises(SdqError, match="different lengths"):
                source.family.check()


def test_the_refiners_score_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("sdxl-inpainting"), tmp_path / "model"))
    edit(folder / "model_index.json", requires_aesthetics_score=True)
    source = load_source(folder)
    with pytest.raises(SdqError, match="requires_aesthetics_score"):
        source.family.check()


def test_published_configurations_are_of_the_declared_types() -> None:
    import diffusers

    from sdq_deploy.random_checkpoints import FAMILIES, published

    for family in FAMILIES:
        for name, config in published(family)["components"].items():
            library, kind = config["_class_name"]
            if library == "diffusers":
                check_types(getattr(diffusers, kind), json.loads(json.dumps(config)), name, family)
