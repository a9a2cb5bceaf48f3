"""The shipped weights: size, loading, the classifier's own accuracy, and whether images show their captions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdq_deploy.shapes64 import classifier_path, held_out_pairs, model_path, render, sample_scene

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline():  # type: ignore[no-untyped-def]
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model_path(), safety_checker=None)


def test_the_model_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    assert classifier_path() in files


def test_it_is_stable_diffusion_in_layout_and_schedule(pipeline) -> None:  # type: ignore[no-untyped-def]
    index = json.loads((model_path() / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert len(pipeline.unet.config.block_out_channels) == 3
    assert pipeline.unet.config.resnet_time_scale_shift == "default"
    assert pipeline.vae.config.latent_channels == 4
    assert pipeline.vae_scale_factor == 8
    assert pipeline.tokenizer.model_max_length == 32
    scheduler = pipeline.scheduler.config
    assert scheduler.prediction_type == "epsilon"
    assert not scheduler.clip_sample
    assert not scheduler.set_alpha_to_one
    assert scheduler.steps_offset == 1


def test_latents_are_normalized_and_pictures_survive_the_autoencoder(pipeline) -> None:  # type: ignore[no-untyped-def]
    images = np.stack([render(sample_scene("held_out", index)) for index in range(64)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert 0.9 < float(latents.std()) < 1.1
    psnr = 10 * np.log10(4.0 / float((decoded - pixels).square().mean()))
    assert psnr > 24.0


def test_the_classifier_reads_drawn_scenes() -> None:
    from sdq_deploy.shapes64.classifier import caption_accuracy, features

    scenes = [sample_scene("held_out", 200_000 + index) for index in range(400)]
    images = np.stack([render(scene) for scene in scenes])
    assert caption_accuracy(images, scenes).mean() >= 0.99
    # A wrong caption is told from a right one, and features tell pictures apart.
    assert caption_accuracy(images, scenes[1:] + scenes[:1]).mean() < 0.05
    vectors = features(images[:32])
    assert vectors.shape == (32, 256)
    assert vectors.dtype == np.float32
    assert float(vectors.std(axis=0).mean()) > 0.0


@pytest.mark.export
def test_generated_images_show_their_captions(pipeline) -> None:  # type: ignore[no-untyped-def]
    from sdq_deploy.shapes64.classifier import caption_accuracy
    from sdq_deploy.shapes64.train.evaluate import generate

    pairs = held_out_pairs(32)
    images = generate(pipeline, pairs, guidance_scale=3.0, steps=20, batch=32)
    right = caption_accuracy(images, [pair.scene for pair in pairs])
    assert right.mean() >= 0.6, [pair.prompt for pair, ok in zip(pairs, right, strict=True) if not ok]
    # The caption decides, not chance: the next pair's scene is not what is shown.
    shifted = [pair.scene for pair in pairs[1:] + pairs[:1]]
    assert caption_accuracy(images, shifted).mean() < 0.2
