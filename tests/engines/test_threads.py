"""One loaded pipeline in many threads: nobody gets another's image."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sdq_engines import Pipeline
from sdq_engines.package.store import Package
from sdq_engines.runtime.loop import StepEvent
from tests.engines.test_pipeline import PROMPT

#: What each thread asks for again and again: other prompts, batches, guidance, an image to start from.
CALLS: list[dict[str, object]] = [
    {"prompt": PROMPT, "seed": 1},
    {"prompt": "green star", "seed": 2, "guidance_scale": 1.0},
    {"prompt": ["red", "blue square"], "seed": 3, "num_images_per_prompt": 2},
    {"prompt": "green circle", "seed": 4, "image": np.full((64, 64, 3), 99, np.uint8), "strength": 0.7},
]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_each_image_is_the_one_made_alone(full: Package, engine: str) -> None:
    """The same executables on the same inputs: to the bit."""
    pipeline = Pipeline.from_package(full, engine)
    alone = [pipeline(**call) for call in CALLS]  # type: ignore[arg-type]
    threads, rounds = 2 * len(CALLS), 6
    together = threading.Barrier(threads)

    def work(number: int) -> list[np.ndarray]:
        together.wait()
        return [pipeline(**CALLS[number % len(CALLS)]).latents for _ in range(rounds)]  # type: ignore[arg-type]

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, range(threads)))
    for number, made in enumerate(found):
        for latents in made:
            np.testing.assert_array_equal(latents, alone[number % len(CALLS)].latents)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_first_call_may_be_many(full: Package, engine: str) -> None:
    """The encoder is loaded when it is first needed, by one of the threads that need it."""
    pipeline = Pipeline.from_package(full, engine)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: pipeline(**CALLS[3]).latents, range(4)))  # type: ignore[arg-type]
    for latents in made[1:]:
        np.testing.assert_array_equal(latents, made[0])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_callback_may_make_another_image(full: Package, engine: str) -> None:
    pipeline = Pipeline.from_package(full, engine)
    alone = [pipeline(**call).latents for call in CALLS[:2]]  # type: ignore[arg-type]
    inner: list[np.ndarray] = []

    def callback(event: StepEvent) -> None:
        inner.append(pipeline(**CALLS[1]).latents)  # type: ignore[arg-type]

    outer = pipeline(**CALLS[0], callback=callback).latents  # type: ignore[arg-type]
    np.testing.assert_array_equal(outer, alone[0])
    assert len(inner) == 4
    for latents in inner:
        np.testing.assert_array_equal(latents, alone[1])
