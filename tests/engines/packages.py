"""Writes small, real packages: hand-made graphs, a real byte-level BPE tokenizer, a real sampler table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import LICENSE, SAMPLER, model_file, tokenizer_file
from sdq_engines.package.schema import CallDefaults, Manifest, ModelIO, SamplerInfo, SourceInfo, TextInfo
from sdq_engines.package.store import Package
from tests.engines.graphs import KEY, VALUE, TinyShape, component

WORDS = ["a", "red", "green", "blue", "circle", "square", "triangle", "star", "on", "the", "left", "of", "above", "and"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> Tokenizer:
    """A word-level tokenizer with CLIP's begin and end marks and lower-casing."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<unk>", BEGIN, END])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([BEGIN, END])
    return made


def sampler_tables(shape: TinyShape) -> dict[str, np.ndarray]:
    """Coefficients of a made-up linear sampler that uses every slot: [T, T, R], and what goes with them."""
    random = np.random.default_rng(shape.seed + 9)
    s = shape.slots
    rows = np.zeros((shape.steps, shape.steps, shape.row), np.float32)
    for step in range(shape.steps):
        m = np.zeros((s, s), np.float32)
        m[0, 0] = 0.9
        m[1:, : s - 1] = np.eye(s - 1)
        n = np.concatenate([[-0.3 - 0.05 * step], 0.1 * np.ones(s - 1)])
        cn = np.concatenate([[0.2 if shape.stochastic else 0.0], np.zeros(s - 1)])
        u = np.concatenate([[1.0], 0.05 * random.standard_normal(s - 1)])
        for start in range(step + 1):  # a run that begins later damps the model's output, as multistep samplers do
            rows[start, step] = np.concatenate([m.ravel(), n / (1 + 0.1 * start), cn, u])
    return {
        "coefficients": rows,
        "timesteps": np.linspace(999, 0, shape.steps, dtype=np.float32),
        "init_noise_sigma": np.ones(shape.steps, np.float32),
        "noising": np.stack([np.linspace(0.5, 0.9, shape.steps), np.linspace(0.9, 0.2, shape.steps)], axis=1).astype(
            np.float32
        ),
    }


def manifest(shape: TinyShape) -> Manifest:
    begin, end = len(WORDS) + 1, len(WORDS) + 2
    text = TextInfo(
        tokenizer=tokenizer_file("tokenizer"),
        max_length=shape.tokens,
        pad_token_id=end,
        bos_token_id=begin,
        eos_token_id=end,
    )
    sampler = SamplerInfo(
        scheduler="DDIMScheduler",
        config={"num_train_timesteps": 1000},
        prediction_type="epsilon",
        num_inference_steps=shape.steps,
        num_calls=shape.steps,
        history=shape.history,
        stochastic=shape.stochastic,
        guidance_scale=4.0,
    )
    return Manifest(
        name="tiny",
        family="sd",
        precision=shape.precision,  # type: ignore[arg-type]
        io=ModelIO(
            latent_shape=(4, shape.latent, shape.latent),
            image_size=(8 * shape.latent, 8 * shape.latent),
            prologue_outputs=[KEY, VALUE],
        ),
        text=[text],
        sampler=sampler,
        defaults=CallDefaults(image_strength=0.8, inpaint_strength=1.0),
        source=SourceInfo(model="hand-made", revision=None, sha256="0" * 64, license="CC0", changes="None."),
        components={name: model_file(name) for name in shape.components},
        tools={},
        files={},
    )


def make_package(folder: Path, shape: TinyShape) -> Package:
    """Write the package of this shape, without engines."""
    editor = PackageEditor.create(folder)
    for name in shape.components:
        editor.add_bytes(model_file(name), component(name, shape).SerializeToString())
    editor.add_bytes(tokenizer_file("tokenizer"), tokenizer().to_str().encode())
    editor.add_bytes(SAMPLER, save(sampler_tables(shape)))
    editor.add_bytes(LICENSE, b"CC0\n")
    return editor.commit(manifest(shape))
