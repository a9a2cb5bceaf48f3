"""A manifest that was edited or damaged so that it contradicts its graphs is one sentence when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from sdq_engines import Pipeline
from sdq_engines.errors import SdqError
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import MANIFEST, SAMPLER
from sdq_engines.package.store import Package
from tests.engines.graphs import KEY

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def edited(full: Package, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("edited") / "package"
    shutil.copytree(full.folder, folder)
    return Package(folder, full.manifest)


def rename_component(tree: dict[str, Any], name: str, other: str) -> None:
    for components in (tree["components"], *(entry["components"] for entry in tree["engines"].values())):
        components[other] = components.pop(name)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["io"]["prologue_outputs"].pop(), "graph of denoiser takes '.*', which it does not mention"),
        (lambda tree: tree["io"]["prologue_outputs"].append("x"), "'x' as an output of prologue, which gives no such"),
        (lambda tree: tree["io"].update(prologue_outputs=[KEY, KEY + "s"]), f"'{KEY}s' as an output of prologue"),
        (lambda tree: tree["io"].update(prologue_inputs=["pooled"]), "'pooled' as an output of the text encoders"),
        (lambda tree: tree["io"].update(prologue_inputs=[]), "graph of prologue takes 'text_embeddings'"),
        (lambda tree: tree["io"].update(prologue_inputs=["text_embeddings", "time_ids"]), "'time_ids' as an input of"),
        (lambda tree: tree["io"].update(latent_shape=[4, 16, 16], image_size=[128, 128]), "latents of denoiser"),
        (lambda tree: tree["io"].update(latent_shape=[8, 8, 8]), "latents of denoiser"),
        (lambda tree: tree["io"].update(latent_shape=[4, 0, 8]), "damaged: io.latent_shape.1"),
        (lambda tree: tree["io"].update(extra_channels=5), "'extra_channels' as an input of denoiser"),
        (lambda tree: tree["text"][0].update(max_length=77), "input_ids of text_encoder"),
        (lambda tree: tree["text"][0].update(component="text_encoder_2"), "lists no component 'text_encoder_2'"),
        (lambda tree: rename_component(tree, "vae_decoder", "decoder"), "lists no component 'vae_decoder'"),
        (lambda tree: tree["sampler"].update(stochastic=False), "the graph of denoiser takes 'noise'"),
        (lambda tree: tree["sampler"].update(history=0), r"as coefficients; the manifest has 4 calls and 0 history"),
        (lambda tree: tree["sampler"].update(num_calls=5), r"as coefficients; the manifest has 5 calls"),
        (
            lambda tree: [each["components"].pop("prologue") for each in tree["engines"].values()],
            "component 'prologue'",
        ),
    ],
)
def test_a_manifest_that_contradicts_its_graphs(edited: Package, engine: str, change: Change, message: str) -> None:
    path = edited.folder / MANIFEST
    whole = path.read_text("utf-8")
    tree = json.loads(whole)
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")
    try:
        with pytest.raises(SdqError, match=message) as caught:
            Pipeline.load(edited.folder, engine, "cached")
        assert "\n" not in caught.value.message
        assert caught.value.hint
    finally:
        path.write_text(whole, "utf-8")


@pytest.mark.parametrize("name", ["coefficients", "timesteps", "init_noise_sigma", "noising"])
def test_a_sampler_file_that_lacks_a_tensor(full: Package, tmp_path: Path, name: str) -> None:
    shutil.copytree(full.folder, tmp_path / "package")
    with PackageEditor.edit(tmp_path / "package", "test") as editor:
        tensors = load((tmp_path / "package" / SAMPLER).read_bytes())
        del tensors[name]
        editor.add_bytes(SAMPLER, save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))
        changed = editor.commit(editor.current)
    with pytest.raises(SdqError, match=f"has no such tensor as {name}"):
        Pipeline.from_package(changed, "onnxruntime")
    (tmp_path / "package" / SAMPLER).write_bytes(b"no safetensors")
    with pytest.raises(SdqError, match="cannot be read"):
        Pipeline.from_package(changed, "onnxruntime")
