"""Metrics with weights of their own: against their definition, and their mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdq_deploy.evaluation.perceptual import clip_scorer, inception_space, lpips_scorer
from sdq_engines.errors import SdqError
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = write_tiny_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_embeddings(clip: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    prompts = ["a red circle", "blue " * 30, "a"]
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    found = clip_scorer(clip, prompts).take(images, images, [0, 1])["clip_score"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for index in (0, 1):
        inputs = processor(
            text=[prompts[index]],
            images=[Image.fromarray(images[index])],
            return_tensors="pt",
            truncation=True,
            max_length=16,
        )
        with torch.no_grad():
            answer = model(**inputs)
        cosine = float((answer.image_embeds * answer.text_embeds).sum())
        assert found[index] == pytest.approx(max(0.0, 100 * cosine), abs=1e-4)


def test_a_folder_without_clip_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SdqError, match="does not load as a CLIP model"):
        clip_scorer(tmp_path, ["a"])


def test_lpips_of_local_weights(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "alexnet.pth")
    reference = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    images = reference.copy()
    images[1] = 255 - images[1]
    found = lpips_scorer(tmp_path / "alexnet.pth").take(images, reference, [0, 1])["lpips"]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] > 0.01


@pytest.mark.parametrize(("load", "module"), [(lpips_scorer, "torchvision"), (inception_space, "torch_fidelity")])
def test_wrong_weights_are_one_sentence(load: object, module: str, tmp_path: Path) -> None:
    pytest.importorskip(module)
    assert callable(load)
    other, junk = tmp_path / "other.pth", tmp_path / "junk.pth"
    torch.save({"a": torch.zeros(1)}, other)
    junk.write_bytes(b"hello")
    for path, said in ((other, "are not those of"), (junk, "is no weights file"), (tmp_path / "none", "do not exist")):
        with pytest.raises(SdqError, match=said):
            load(path)


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("torch_fidelity") is not None:
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(SdqError, match="FID needs torch_fidelity, which is not installed"):
        inception_space(tmp_path / "weights.pth")
