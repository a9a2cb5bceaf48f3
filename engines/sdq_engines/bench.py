"""How fast a package is here: each component warm, the whole call, and the loop's own cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from sdq_engines.package.layout import DENOISER, PROLOGUE, VAE_DECODER
from sdq_engines.package.schema import EXTRA_CHANNELS
from sdq_engines.runtime.pipeline import Pipeline

__all__ = ["BenchReport", "Timing", "bench", "component_calls", "measure"]

PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over its warm runs."""

    median: float
    best: float
    worst: float
    runs: int


@dataclass(frozen=True)
class BenchReport:
    """One engine's figures."""

    engine: str
    backend_version: str
    batch: int
    steps: int
    components: dict[str, Timing]
    """Per call; the denoiser's is one step."""
    end_to_end: Timing
    """Prompt to pixels."""
    loop_outside_engine: float
    """Share of the loop's time outside the engine's calls, 0..1, the median of the runs."""
    load_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure(
    call: Callable[[], object], runs: int, warm_up: int = 2, on_run: Callable[[], None] | None = None
) -> Timing:
    """Time `call` after warming up."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
        if on_run is not None:
            on_run()
    return Timing(statistics.median(seconds), min(seconds), max(seconds), runs)


def bench(
    load: Callable[[], Pipeline], batch: int = 1, runs: int = 10, on_stage: Callable[[str], None] | None = None
) -> BenchReport:
    """Load a pipeline and time it.

    Args:
        load: makes the pipeline; its time is measured too.
        batch: images per call.
        runs: of each timing, after two warm ones.
        on_stage: hears what is being timed.
    """
    announce = on_stage or (lambda stage: None)
    announce("loading")
    started = time.perf_counter()
    pipeline = load()
    for name in pipeline.manifest.components:
        pipeline.session.component(name)
    loaded = time.perf_counter() - started
    components = {}
    with component_calls(pipeline, batch) as calls:
        for name, call in calls.items():
            announce(name)
            components[name] = measure(call, runs)
    announce("end to end")
    loops: list[float] = []

    def whole() -> None:
        loops.extend(spent.outside for spent in pipeline(PROMPT, seed=0, num_images_per_prompt=batch).loops)

    end_to_end = measure(whole, max(3, runs // 2), warm_up=1)
    return BenchReport(
        engine=pipeline.engine,
        backend_version=pipeline.session.entry.version,
        batch=batch,
        steps=pipeline.manifest.sampler.num_calls,
        components=components,
        end_to_end=end_to_end,
        loop_outside_engine=statistics.median(loops),
        load_seconds=loaded,
    )


@contextmanager
def component_calls(pipeline: Pipeline, batch: int) -> Iterator[dict[str, Callable[[], object]]]:
    """One call of each component with inputs of the sizes that an image of this batch needs, for a block."""
    inputs = pipeline.prompts.encode([PROMPT])
    prompt = {name: np.repeat(value, 2 * batch, axis=0) for name, value in pipeline.prologue(inputs).items()}
    shape = (batch, *pipeline.latent_shape())
    if extra := pipeline.manifest.io.extra_channels:
        prompt[EXTRA_CHANNELS] = np.zeros((batch, extra, *shape[2:]), np.float32)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    coefficients = pipeline.coefficients
    noise = latents if pipeline.manifest.sampler.stochastic else None
    with closing(pipeline.session.stepper(latents, 2.0, coefficients, prompt)) as stepper:

        def step() -> None:
            stepper.step(0, noise)
            stepper.latents()  # a GPU step is enqueued; this waits for it

        yield {
            **{name: partial(pipeline.prompts.embed, name, [PROMPT]) for name in pipeline.prompts.components},
            PROLOGUE: lambda: pipeline.prologue(inputs),
            DENOISER: step,
            VAE_DECODER: lambda: pipeline.decode(latents),
        }
