"""How the package commands show engines, figures and progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdq_deploy.display.consoles import console, new_progress

if TYPE_CHECKING:
    from sdq_deploy.display.progress import Status
    from sdq_engines.runtime.loop import StepEvent
    from sdq_engines.runtime.pipeline import Pipeline

__all__ = [
    "StepBar",
    "megabytes",
    "milliseconds",
    "print_bench",
    "print_engine",
    "print_evaluation",
    "print_parity",
    "say",
    "stage_shower",
]

_HASH_DIGITS = 12
"""Of a prompt set's SHA-256, enough to tell two of them apart."""


def say(text: str, markup: bool = True) -> None:
    """One line of a result, never wrapped: it may be piped."""
    console.print(text, markup=markup, soft_wrap=True)


class StepBar:
    """A bar over the denoising steps of all batches, shown once they have taken a second."""

    def __init__(self, pipeline: Pipeline, images: int) -> None:
        self.batches = -(-images // pipeline.session.entry.profile.batch_max)
        self.done, self.started = 0, time.monotonic()
        self.progress: Any = None

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, event: StepEvent) -> None:
        self.done += 1
        if self.progress is None and time.monotonic() - self.started > 1:
            self.progress = new_progress()
            self.progress.start()
            self.task = self.progress.add_task("denoising", total=self.batches * event.num_steps)
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done)


def _sizes(profile: dict[str, Any]) -> str:
    """The image sizes of an engine that was built for others than the package's own."""
    if not profile.get("size_min"):
        return ""
    low, best, high = ("{1}x{0}".format(*profile[f"size_{which}"]) for which in ("min", "opt", "max"))
    return f", {low} pixels" if low == high else f", {low} to {high} pixels (tuned for {best})"


def print_engine(name: str, entry: dict[str, Any]) -> None:
    """An engine's entry of the manifest: what it was built for and what its kernels compute."""
    profile, kernels = entry["profile"], entry["kernels"]
    say(
        f"[bold]{name}[/]  {entry['version']}, for {entry['target']}, "
        f"{profile['batch_min']} to {profile['batch_max']} images (tuned for {profile['batch_opt']})"
        f"{_sizes(profile)}"
    )
    say(
        f"  built in {entry['build_seconds']:.1f} s, peak memory {megabytes(entry['peak_memory_bytes'])}, "
        f"{megabytes(entry['bytes_on_disk'])} on disk"
    )
    if kernels is None:
        return
    say(
        f"  of {kernels['quantized_layers']} quantized layers: {kernels['int8']} INT8 x INT8 kernels, "
        f"{kernels['fp8']} FP8 x FP8, "
        f"{kernels['int4']} INT4, {len(kernels['fallback'])} in floating point"
    )
    # All of them is the engine's nature; some are worth naming.
    if 0 < len(kernels["fallback"]) < kernels["quantized_layers"]:
        for layer in kernels["fallback"]:
            say(f"    floating point: {layer}", markup=False)


def print_parity(criteria: dict[str, Any]) -> None:
    """What the manifest says of parity: each criterion's figure over all steps, or its worst one, and the limit."""
    for name, figures in criteria.items():
        figure = figures["worst"] if figures.get("overall") is None else figures["overall"]
        say(f"  {name:24} {figure:.4g}, at most {figures['limit']:.4g}: {figures['says']}", markup=False)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """What `evaluate --write-manifest` left in the manifest: figures with their intervals, and on which prompts."""
    prompts = evaluation["prompts"]
    say(
        f"evaluation by {evaluation['engine']} against {evaluation['reference']['model']}: {prompts['count']} images, "
        f"{prompts['title']}, prompt set {prompts['sha256'][:_HASH_DIGITS]}",
        markup=False,
    )
    for name, figure in evaluation["figures"].items():
        interval = "" if figure.get("low") is None else f" ({figure['low']:.4g} to {figure['high']:.4g})"
        worst = "" if figure.get("worst") is None else f", worst {figure['worst']:.4g}"
        say(f"  {name:24} {figure['value']:.4g}{interval}{worst}", markup=False)


def print_bench(report: dict[str, Any]) -> None:
    """A `BenchReport` as plain data."""
    say(
        f"[bold]{report['engine']}[/] {report['backend_version']}, {report['batch']} image(s) a call, "
        f"loaded in {report['load_seconds']:.2f} s"
    )
    for name, timing in report["components"].items():
        say(f"  {name:14} {milliseconds(timing)}")
    say(
        f"  {'end to end':14} {milliseconds(report['end_to_end'])}, {report['steps']} steps, "
        f"{report['loop_outside_engine']:.2%} of the loop outside the engine"
    )


def milliseconds(timing: dict[str, float]) -> str:
    """The median of a `Timing` as plain data."""
    return f"{timing['median'] * 1e3:8.1f} ms"


def megabytes(size: float) -> str:
    """A number of bytes."""
    return f"{size / 1e6:.1f} MB"


def stage_shower(status: Status, name: str) -> Callable[[str], None]:
    """What a long command is doing, beside its spinner."""
    return lambda stage: status.update(f"{name}: {stage}")
