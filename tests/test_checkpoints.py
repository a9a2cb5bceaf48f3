"""The makers of checkpoints: the published architectures, random where ones and zeros would hide errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdq_deploy.random_checkpoints import make_component, published, scaled, write_checkpoint
from tests.tiny import write_tiny_sd, write_tiny_sd2, write_tiny_sd3, write_tiny_sdxl

# What the published checkpoints hold, in parameters.
PARAMETERS = {
    ("sd14", "unet"): 859_520_964,
    ("sd14", "vae"): 83_653_863,
    ("sd14", "text_encoder"): 123_060_480,
    ("sd21", "unet"): 865_910_724,
    ("sd21", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("sd3", "transformer"): 2_028_328_000,
    ("sd3", "vae"): 83_819_683,
    ("sd3", "text_encoder_3"): 4_762_310_656,
}


@pytest.mark.parametrize(("family", "component"), PARAMETERS)
def test_the_published_architectures_have_the_published_sizes(family: str, component: str) -> None:
    model = make_component(published(family)["components"][component])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[family, component]
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("write", "pipeline"),
    [
        (write_tiny_sd, "StableDiffusionPipeline"),
        (write_tiny_sd2, "StableDiffusionPipeline"),
        (write_tiny_sdxl, "StableDiffusionXLPipeline"),
        (write_tiny_sd3, "StableDiffusion3Pipeline"),
    ],
)
def test_diffusers_loads_a_tiny_checkpoint_and_its_prompt_matters(
    write: Callable[[Path], Path], pipeline: str, tmp_path: Path
) -> None:
    import diffusers

    absent = {"text_encoder_3": None, "tokenizer_3": None} if pipeline == "StableDiffusion3Pipeline" else {}
    absent |= {"safety_checker": None} if write is write_tiny_sd else {}
    pipe = getattr(diffusers, pipeline).from_pretrained(write(tmp_path / "model"), **absent)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = pipe(prompt, num_inference_steps=3, generator=generator, output_type="pt").images
        assert images.shape == (1, 3, 64, 64)
        return images

    red, boats = draw("a red circle"), draw("green boats")
    assert red.std() > 0.05
    assert (red - boats).abs().mean() > 1e-3
    norms = [module for module in pipe.vae.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert all(module.weight.std() > 0.05 and module.bias.std() > 0.05 for module in norms)


def test_half_precision_variant_files_and_the_seed(tmp_path: Path) -> None:
    changes = scaled("sd14", 1 / 10, 8, thin=True)
    changes = {**changes, "text_encoder": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}}
    changes["unet"] = {**changes["unet"], "cross_attention_dim": 32}
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = write_checkpoint(tmp_path / name, "sd14", changes, dtype=torch.float16, variant="fp16", seed=seed)
        files.append(load_file(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"))
    first, second, other = files
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].numel() > 4)


def test_t5_keeps_one_embedding_under_its_two_names(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    folder = write_tiny_sd3(tmp_path / "model", t5=True)
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
