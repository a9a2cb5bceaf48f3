"""Prompts as people write them, against diffusers' own pipelines: chunks, weights, skipped layers, embeddings, and
texts for each encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_export.embeddings import parse_embedding
from sdq_export.sampler import compile_sampler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.text_settings import TextSettings, text_settings
from sdq_export.writer import export_package
from tests.export.conftest import GUIDANCE, OTHER_STEPS
from tests.images import psnr
from tests.tiny import MAX_LENGTH, SECOND_WIDTH, WIDTH

SEEDS = [3, 4]
ROOM = MAX_LENGTH - 2
NAME = "<my-style>"


def vectors(width: int, count: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings of three vectors, for Stable Diffusion 1 and for XL's two text encoders."""
    folder = tmp_path_factory.mktemp("embeddings")
    made = {"sd": folder / "sd.safetensors", "sdxl": folder / "sdxl.safetensors"}
    save_file({"emb_params": vectors(WIDTH)}, made["sd"])
    save_file({"clip_l": vectors(WIDTH), "clip_g": vectors(SECOND_WIDTH)}, made["sdxl"])
    return made


def pipeline_of(folder: Path, **options: Any) -> Any:
    """diffusers' own pipeline of a checkpoint."""
    made = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    made.set_progress_bar_config(disable=True)
    encoder = made.text_encoder
    if not hasattr(encoder, "text_model"):  # where diffusers' clip_skip looks for CLIP's last normalization
        object.__setattr__(encoder, "text_model", encoder)
    return made


def images_of(pipe: Any, **options: Any) -> NDArray[np.float32]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    found = pipe(
        num_inference_steps=OTHER_STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        output_type="np",
        **options,
    ).images
    return np.round(found * 255) / 255


def ours(pipeline: Pipeline, prompt: Any, **options: Any) -> NDArray[np.float32]:
    made = pipeline(prompt, seed=SEEDS, guidance_scale=GUIDANCE, **options).images
    return np.stack([np.asarray(image, np.float32) / 255 for image in made])


def packaged(source: Source, out: Path) -> Pipeline:
    plan = compile_sampler(source.scheduler, OTHER_STEPS)
    made = export_package(source, out, plan, GUIDANCE, PackageSettings(dtype="fp32", vae_encoder=False))
    return Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")


TWO_TEXTS: list[dict[str, Any]] = [
    {"prompt": ["a red circle", "two stars"], "prompt_2": ["blue", "a circle"]},
    {"prompt": ["a red circle", "two stars"], "negative_prompt": ["green", "x"], "negative_prompt_2": ["y", ""]},
    {"prompt": "a red circle", "num_images_per_prompt": 2, "prompt_2": "blue", "negative_prompt": ""},
    {"prompt": "a red circle", "num_images_per_prompt": 2, "negative_prompt_2": "blue"},
    {"prompt": "a red circle", "num_images_per_prompt": 2, "negative_prompt": "x", "negative_prompt_2": ""},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", TWO_TEXTS)
def test_each_text_encoder_reads_its_own_prompt(other_family: tuple[Source, Pipeline], options: dict[str, Any]) -> None:
    source, pipeline = other_family
    wanted = images_of(source.pipeline(source.scheduler), **options)
    assert psnr(ours(pipeline, **options), wanted) >= 50
    changed = {name: value for name, value in options.items() if not name.endswith("_2")}
    sees_zeros = pipeline.manifest.io.force_zeros_for_empty_prompt and "negative_prompt" not in options
    if "prompt_2" in options or (options.get("negative_prompt_2") and not sees_zeros):
        assert psnr(ours(pipeline, **changed), wanted) < 45


@pytest.fixture(scope="module")
def chunked(
    tiny: Callable[[str], Path], files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Pipeline]:
    """diffusers' pipeline with an embedding, and a package of two chunks, a skipped layer and the same embedding."""
    folder, out = tiny("sd"), tmp_path_factory.mktemp("chunked")
    pipe = pipeline_of(folder, safety_checker=None)
    pipe.load_textual_inversion({NAME: vectors(WIDTH)}, token=NAME)
    source = load_source(folder).with_text(
        TextSettings(prompt_chunks=2, clip_skip=1), [parse_embedding(f"{NAME}={files['sd']}")]
    )
    return pipe, packaged(source, out / "package")


def embedded(pipe: Any, chunks: Sequence[str], skip: int | None) -> Tensor:
    """What diffusers embeds each chunk as, one after the other."""
    return torch.cat([pipe.encode_prompt(chunk, "cpu", 1, False, clip_skip=skip)[0] for chunk in chunks], dim=1)


LONG = "a circle a circle a circle a circle a circle a circle a circle red red"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a red circle", ["a red circle", ""]),
        ("a red BREAK circle", ["a red", "circle"]),
        (LONG, ["a circle " * 7, "red red"]),
        (f"red {NAME} circle", [f"red {NAME} circle", ""]),
        # an embedding that does not fit into what is left of a chunk goes to the next as a whole
        ("a circle " * 6 + f"{NAME} red", ["a circle " * 6, f"{NAME} red"]),
    ],
)
def test_chunks_are_what_diffusers_embeds_them_as(
    chunked: tuple[Any, Pipeline], prompt: str, chunks: list[str]
) -> None:
    pipe, pipeline = chunked
    assert len(pipe.tokenizer("a circle " * 7).input_ids) == MAX_LENGTH
    negative = "blue"
    with torch.no_grad():
        texts = embedded(pipe, chunks, 1).repeat(2, 1, 1)
        negatives = embedded(pipe, [negative, ""], None).repeat(2, 1, 1)
    wanted = images_of(pipe, prompt_embeds=texts, negative_prompt_embeds=negatives)
    found = ours(pipeline, [prompt, prompt], negative_prompt=negative)
    assert psnr(found, wanted) >= 50
    assert psnr(ours(pipeline, ["a blue star"] * 2, negative_prompt=negative), wanted) < 45


@pytest.mark.slow
def test_weights_scale_the_embeddings_and_keep_their_mean(chunked: tuple[Any, Pipeline]) -> None:
    pipe, pipeline = chunked
    ids = pipe.tokenizer("a red circle").input_ids
    weights = torch.ones(MAX_LENGTH)
    weights[ids.index(pipe.tokenizer("red").input_ids[1])] = 1.5
    with torch.no_grad():
        plain = embedded(pipe, ["a red circle"], 1)
        scaled = plain * weights[None, :, None]
        scaled = scaled * (plain.mean() / scaled.mean())
        texts = torch.cat([scaled, embedded(pipe, [""], 1)], dim=1).repeat(2, 1, 1)
        negatives = embedded(pipe, ["", ""], None).repeat(2, 1, 1)
    wanted = images_of(pipe, prompt_embeds=texts, negative_prompt_embeds=negatives)
    assert psnr(ours(pipeline, ["a (red:1.5) circle"] * 2, prompt_weighting="a1111"), wanted) >= 50
    # off by default: brackets are text
    assert psnr(ours(pipeline, ["a (red:1.5) circle"] * 2), wanted) < 45


@pytest.mark.slow
def test_a_package_says_how_it_reads_prompts_and_what_it_cuts(
    chunked: tuple[Any, Pipeline], caplog: pytest.LogCaptureFixture
) -> None:
    _, pipeline = chunked
    (text,) = pipeline.manifest.text
    assert (text.max_length, text.chunks, text.clip_skip) == (MAX_LENGTH, 2, 1)
    assert text.written_out == {NAME: f"{NAME} {NAME}_1 {NAME}_2"}
    pipeline("a circle " * 14 + "red", seed=1)
    assert f"longer than the 2 chunks of {MAX_LENGTH} tokens" in caplog.text
    assert "cut off: 'red'" in caplog.text


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("skip", [0, 1])
def test_conditioning_equals_diffusers_encode_prompt(
    name: str, skip: int, tiny: Callable[[str], Path], files: dict[str, Path]
) -> None:
    """An embedding in the prompt, layers skipped, negative prompts in full."""
    pipe = pipeline_of(tiny(name), **({"safety_checker": None} if name == "sd" else {}))
    pipe.load_textual_inversion({NAME: vectors(WIDTH)}, token=NAME)
    if name == "sdxl":
        second = {"tokenizer": pipe.tokenizer_2, "text_encoder": pipe.text_encoder_2}
        pipe.load_textual_inversion({NAME: vectors(SECOND_WIDTH)}, token=NAME, **second)
    source = load_source(tiny(name)).with_text(TextSettings(clip_skip=skip), [parse_embedding(f"{NAME}={files[name]}")])
    prompts = ["a red circle", f"blue {NAME}, {NAME} red", "word " * 40]
    found = source.family.encode_prompts(source, [*prompts, None]).tensors
    with torch.no_grad():
        wanted = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                                    clip_skip=skip or None)  # fmt: skip
    texts, negative = wanted[0], wanted[1][:1]
    torch.testing.assert_close(found["text_embeddings"], torch.cat([texts, negative]), atol=1e-5, rtol=1e-5)
    if name == "sdxl":
        torch.testing.assert_close(
            found["pooled_embeddings"], torch.cat([wanted[2], wanted[3][:1]]), atol=1e-5, rtol=1e-5
        )
    plain = load_source(tiny(name)).with_text(TextSettings(clip_skip=1 - skip))
    other = plain.family.encode_prompts(plain, prompts[:1]).tensors["text_embeddings"]
    assert (other - texts[:1]).abs().max() > 1e-2


def test_stable_diffusion_3_skips_layers_and_takes_chunks(tiny: Callable[[str], Path]) -> None:
    pipe = pipeline_of(tiny("sd3-t5"))
    source = load_source(tiny("sd3-t5")).with_text(TextSettings(clip_skip=1, prompt_chunks=2))
    with torch.no_grad():
        whole, _, pooled, _ = pipe.encode_prompt("red", None, None, device="cpu", clip_skip=1)
        second, _, _, _ = pipe.encode_prompt("circle", None, None, device="cpu", clip_skip=1)
        t5 = pipe.encode_prompt("red circle", None, None, device="cpu")[0][:, MAX_LENGTH:]
    found = source.family.encode_prompts(source, ["red BREAK circle"]).tensors
    clip = torch.cat([whole[:, :MAX_LENGTH], second[:, :MAX_LENGTH]], dim=1)[..., : found["text_embeddings"].shape[-1]]
    torch.testing.assert_close(found["text_embeddings"], clip, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pooled_embeddings"], pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["t5_embeddings"], t5, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_one_sentence(tiny: Callable[[str], Path], files: dict[str, Path], tmp_path: Path) -> None:
    source = load_source(tiny("sd"))
    too_many = source.with_text(TextSettings(clip_skip=2))
    with pytest.raises(SdqError, match=r"clip_skip is 2, and the text_encoder of .* has 2 layers"):
        too_many.family.encode_prompts(too_many, ["a"])
    for chunks, skip, message in ((0, None, "1 to 16, not 0"), (17, None, "not 17"), (None, -1, "0 or more layers")):
        with pytest.raises(SdqError, match=message):
            text_settings(None, chunks, skip)
    with pytest.raises(SdqError, match="trained with clip_skip 1"):
        text_settings(TextSettings(clip_skip=1), None, 2)
    assert text_settings(TextSettings(clip_skip=1, prompt_chunks=2), 3, None).model_dump() == {
        "prompt_chunks": 3,
        "clip_skip": 1,
    }

    def file(name: str, **tensors: Tensor) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    (tmp_path / "pickle.pt").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    nan = vectors(WIDTH)
    nan[1, 2] = float("nan")
    for text, message in (
        ("style.safetensors", "takes NAME=FILE"),
        (f"a b={files['sd']}", "is not one word"),
        (f"style={tmp_path / 'missing.safetensors'}", "does not exist"),
        (f"style={tmp_path / 'pickle.pt'}", "loading a pickle can run any code"),
        (f"style={tmp_path / 'cut.safetensors'}", "cannot be read"),
        (f"style={file('two.safetensors', a=nan, b=vectors(WIDTH))}", "holds a, b; one tensor"),
        (f"style={file('nan.safetensors', emb_params=nan)}", "NaN or infinity"),
        (f"style={file('pair.safetensors', clip_l=vectors(8), clip_g=vectors(8, 2))}", "different numbers of vectors"),
    ):
        with pytest.raises(SdqError, match=message):
            parse_embedding(text)
    taken = parse_embedding(f"circle</w>={files['sd']}")
    with pytest.raises(SdqError, match="is taken"):
        source.with_text(TextSettings(), [taken])
    wide = parse_embedding(f"style={files['sdxl']}")
    with pytest.raises(SdqError, match="none for the text_encoder_2"):
        load_source(tiny("sdxl")).with_text(TextSettings(), [parse_embedding(f"style={files['sd']}")])
    with pytest.raises(SdqError, match="take no embeddings"):
        load_source(tiny("sd3")).with_text(TextSettings(), [wide])
