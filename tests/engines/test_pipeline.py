"""The pipeline: against a loop written out here, across engines, and against what callers may not ask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdq_engines import Pipeline
from sdq_engines.backends.base import Arrays
from sdq_engines.backends.nvidia import cuda
from sdq_engines.backends.onnxruntime import OnnxRuntimeComponent, open_session
from sdq_engines.errors import SdqError
from sdq_engines.package.store import Package
from sdq_engines.runtime.loop import StepEvent
from sdq_engines.runtime.noise import NoiseStream
from sdq_engines.runtime.sampler import SamplerTables
from tests.engines.graphs import KEY, VALUE
from tests.engines.packages import WORDS

Built = Callable[[str], Package]
PROMPT = "a red circle on the left of a blue square"


def relative(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def by_hand(package: Package, prompt: str, negative: str, seed: int, guidance: float) -> Arrays:
    """The whole run with plain ONNX Runtime calls, following docs/package-format.md to the letter."""
    graphs = {
        name: OnnxRuntimeComponent(open_session(package.component(name)), "cpu") for name in package.manifest.components
    }
    text = package.manifest.text[0]
    ids = []
    for words in (negative, prompt):
        row = [text.bos_token_id, *(WORDS.index(word) for word in words.split()), text.eos_token_id]
        ids.append(row + [text.pad_token_id] * (text.max_length - len(row)))
    embeddings = graphs["text_encoder"].run({"input_ids": np.array(ids)})["text_embeddings"]
    feeds = graphs["prologue"].run({"text_embeddings": embeddings})
    assert feeds[KEY].shape[0] == feeds[VALUE].shape[0] == 2
    tables = SamplerTables.load(package.path("sampler.safetensors"), package.manifest.sampler)
    stream = NoiseStream(seed)
    shape = package.manifest.io.latent_shape
    feeds["latents"] = stream.normal(shape)[None] * tables.init_noise_sigma[0]
    history = package.manifest.sampler.history
    if history:
        feeds["history"] = np.zeros((1, history, *shape), np.float32)
    feeds["guidance_scale"] = np.float32(guidance)
    for step, row in enumerate(tables.coefficients[0]):
        feeds |= {"step": np.int64(step), "coefficients": row}
        if package.manifest.sampler.stochastic:
            feeds["noise"] = stream.normal(shape)[None]
        out = graphs["denoiser"].run({name: np.asarray(value) for name, value in feeds.items()})
        feeds["latents"] = out["latents_out"]
        if history:
            feeds["history"] = out["history_out"]
    return {"latents": feeds["latents"], **graphs["vae_decoder"].run({"latents": feeds["latents"]})}


@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])  # with history; stochastic
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_run_equals_the_steps_by_hand(built: Built, precision: str, engine: str) -> None:
    package = built(precision)
    made = Pipeline.from_package(package, engine)(PROMPT, negative_prompt="green star", seed=5, guidance_scale=3.0)
    wanted = by_hand(package, PROMPT, "green star", 5, 3.0)
    assert relative(made.latents, wanted["latents"]) < (1e-6 if engine == "onnxruntime" else 2e-2)
    pixels = np.asarray(made.images[0], np.float32).transpose(2, 0, 1)[None]
    assert np.abs(pixels - 255 * wanted["images"]).mean() < (0.51 if engine == "onnxruntime" else 2)
    assert made.images[0].size == (64, 64)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_image_does_not_depend_on_its_batch(built: Built, engine: str) -> None:
    pipeline = Pipeline.from_package(built("w4a16"), engine)
    many = pipeline([PROMPT, "green star"], seed=40, num_images_per_prompt=3)  # six images, four at once
    assert many.seeds == [40, 41, 42, 43, 44, 45]
    assert many.latents.shape == (6, 4, 8, 8)
    for index, prompt in ((2, PROMPT), (4, "green star"), (5, "green star")):
        alone = pipeline(prompt, seed=40 + index)
        assert relative(alone.latents[0], many.latents[index]) < 1e-2
        assert relative(alone.latents[0], many.latents[index - 1]) > 0.5
    listed = pipeline(PROMPT, seed=[42], num_images_per_prompt=1)
    assert relative(listed.latents[0], many.latents[2]) < 1e-2


def test_guidance_matters_and_none_means_none(built: Built) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "onnxruntime")

    def latents(scale: float | None, negative: str | None = None) -> np.ndarray:
        return pipeline(PROMPT, negative, seed=1, guidance_scale=scale).latents

    default = pipeline.manifest.sampler.guidance_scale
    assert np.array_equal(latents(None), latents(default))
    assert relative(latents(2.0), latents(default)) > 1e-4
    assert relative(latents(default, "green"), latents(default)) > 1e-4
    # At 1 or less there is no guidance: the negative prompt is not looked at.
    assert np.array_equal(latents(1.0), latents(0.0, "green"))


def test_the_callback_hears_every_step_of_every_batch(built: Built) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "openvino")
    heard: list[tuple[int, range]] = []
    last: list[np.ndarray] = []

    def callback(event: StepEvent) -> None:
        heard.append((event.step, event.images))
        assert event.num_steps == 4
        last.append(event.latents())

    made = pipeline(PROMPT, seed=0, num_images_per_prompt=5, callback=callback)
    assert heard == [(step, images) for images in (range(4), range(4, 5)) for step in range(4)]
    assert np.array_equal(last[3], made.latents[:4])
    assert not np.array_equal(last[2], last[3])


def test_seeds_repeat_and_are_told(built: Built) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "onnxruntime")
    first = pipeline(PROMPT)
    again = pipeline(PROMPT, seed=first.seeds[0])
    assert np.array_equal(first.latents, again.latents)
    assert pipeline(PROMPT).seeds != first.seeds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 50}, "4 steps; 50 steps were asked"),
        ({"scheduler": "EulerDiscreteScheduler"}, "DDIMScheduler at 4 steps; the scheduler Euler"),
        ({"guidance_rescale": 0.7}, "cannot honour guidance_rescale"),
        ({"eta": 0.5}, "cannot honour eta"),
        ({"height": 512}, "cannot honour height"),
        ({"generator": object()}, "cannot honour generator"),
        ({"nonsense": 1}, "no argument 'nonsense'"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 images"),
        ({"seed": 2**70}, "is no seed"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; a whole number from 1 on"),
    ],
)
def test_what_a_package_cannot_honour_is_one_sentence(built: Built, arguments: dict[str, object], message: str) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "onnxruntime")
    with pytest.raises(SdqError, match=message):
        pipeline(PROMPT, **arguments)  # type: ignore[arg-type]


def test_the_packages_own_values_are_taken(built: Built) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "onnxruntime")
    for scheduler in ("ddim", "DDIM", "DDIMScheduler"):
        pipeline(PROMPT, num_inference_steps=4, scheduler=scheduler, guidance_rescale=None, eta=None)


def test_a_long_prompt_is_cut_and_named(built: Built, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "onnxruntime")
    with caplog.at_level(logging.WARNING):
        made = pipeline("red " * 10 + "star above", seed=0)
    assert "'star above'" in caplog.text
    assert "'red" not in caplog.text
    assert np.array_equal(made.latents, pipeline("red " * 10, seed=0).latents)


def test_the_engines_part_of_the_loop_is_told(built: Built) -> None:
    """One record a batch; the rest of it, which benchmarks measure, is what the loop costs beside the engine."""
    spent = Pipeline.from_package(built("w4a16"), "onnxruntime")(PROMPT, seed=0, num_images_per_prompt=5).loops
    assert len(spent) == 2
    assert all(0 < each.engine < each.total for each in spent)


def test_auto_takes_the_fastest_that_works_and_says_what_is_missing(built: Built, bare: Package) -> None:
    assert Pipeline.from_package(built("w4a8")).engine == "openvino"
    with pytest.raises(SdqError, match="has no engine") as caught:
        Pipeline.load(bare.folder)
    assert "sdq-deploy build" in caught.value.hint
    with pytest.raises(SdqError, match="Did you mean 'openvino'"):
        Pipeline.load(bare.folder, engine="openvinno")


def test_an_engine_of_another_version_or_machine_is_refused_and_auto_passes_on(copy: Package) -> None:
    entry = copy.manifest.engines["openvino"]
    for change, message in (
        ({"version": "2020.1"}, "built by OpenVINO 2020.1"),
        ({"target": "riscv CPU"}, "built for: riscv"),
    ):
        engines = {**copy.manifest.engines, "openvino": entry.model_copy(update=change)}
        other = Package(copy.folder, copy.manifest.model_copy(update={"engines": engines}))
        with pytest.raises(SdqError, match=message) as caught:
            Pipeline.from_package(other, "openvino")
        assert "sdq-deploy build" in caught.value.hint
        assert Pipeline.from_package(other).engine == "onnxruntime"


@pytest.mark.skipif(cuda.find_gpu()[0] is not None, reason="this machine has a GPU")
@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_that_does_not_work_here_says_what_is_missing(copy: Package, engine: str) -> None:
    entry = copy.manifest.engines["openvino"].model_copy(update={"backend": engine})
    engines = {engine: entry, "onnxruntime": copy.manifest.engines["onnxruntime"]}
    other = Package(copy.folder, copy.manifest.model_copy(update={"engines": engines}))
    with pytest.raises(SdqError, match=f"The engine {engine} does not work here") as caught:
        Pipeline.from_package(other, engine)
    assert caught.value.hint
    assert Pipeline.from_package(other).engine == "onnxruntime"


def test_a_provider_that_is_not_there_is_named(built: Built) -> None:
    with pytest.raises(SdqError, match="no CUDAExecutionProvider"):
        Pipeline.from_package(built("w4a8"), "onnxruntime", providers=["CUDAExecutionProvider"])


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("openvino", {"providers": ["CUDAExecutionProvider"]}, "openvino takes no option 'providers'"),
        ("auto", {"providers": ["CUDAExecutionProvider"]}, "openvino takes no option 'providers'"),
        ("openvino", {"thread": 2}, "Did you mean 'threads'"),
        ("onnxruntime", {"session_options": None}, "onnxruntime takes no option 'session_options'"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    built: Built, engine: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(SdqError, match=message) as caught:
        Pipeline.from_package(built("w4a8"), engine, **options)
    assert "threads" in caught.value.hint


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("threads", [-1, "two", True, 1.5])
def test_threads_are_a_whole_number(built: Built, engine: str, threads: Any) -> None:
    with pytest.raises(SdqError, match=r"threads is .* whole number"):
        Pipeline.from_package(built("w4a8"), engine, threads=threads)


def test_one_provider_may_stand_alone(built: Built) -> None:
    assert Pipeline.from_package(built("w4a8"), "onnxruntime", providers="CPUExecutionProvider").engine == "onnxruntime"
    with pytest.raises(SdqError, match="a list of names is wanted"):
        Pipeline.from_package(built("w4a8"), "onnxruntime", providers=[7])


@pytest.mark.parametrize(("options", "message"), [({"engine": None}, "no engine None"), ({"verify": "fast"}, "'full'")])
def test_a_word_that_is_not_known_is_refused(built: Built, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SdqError, match=message):
        Pipeline.load(built("w4a8").folder, **options)
