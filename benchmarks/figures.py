"""Why serial data trained in parallel: figures 2 to 4 of "Efficiency Meets Fidelity" drawn from our own runs.

    python benchmarks/figures.py build/figures --dataset RUN        # about ten minutes on two cores

Trains shapes-64 to W4A8 for a few dozen iterations in each pipeline, from one initialization and with nothing frozen,
and looks at the gradients, the loss and the oscillation; then compares what the denoiser is given in the pipelines.
Prints the medians that are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from sdq_deploy.models import resolve_model
from sdq_deploy.recipes import load_recipe
from sdq_deploy.recipes.schema import Pipeline
from sdq_deploy.training.batches import make_source
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.fit import Fitting, full_training
from sdq_deploy.training.run import make_accelerator, read_settings
from sdq_export.source import load_source

PIPELINES: dict[Pipeline, str] = {
    "serial": "serial",
    "parallel": "parallel",
    "serial-to-parallel": "serial-to-parallel",
}

#: Oscillation frequency that counts.
OFTEN = 0.01

#: Nothing is frozen, so that oscillation can be seen; no distillation, so that the losses are of one kind.
_PLAIN = {"fit.ild_weight": 0.0, "freezing.threshold_start": 1.0, "freezing.threshold_end": 1.0}


class _Observed(Fitting):
    """A fit that keeps what each iteration's gradients were."""

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context, "", full_training(context))
        self.layers = [site.layer for site in self.student.spec.weights]
        self.before: dict[str, Tensor] = {}
        self.norms: list[list[float]] = []
        self.cosines: list[list[float]] = []
        self.records: list[dict[str, float]] = []

    def observe_step(self) -> None:
        """One iteration."""
        self.records.append(self._train_step() | {"oscillating": self._oscillating()})
        gradients = {layer: cast(Tensor, self.student.weight(layer).grad).flatten().clone() for layer in self.layers}
        self.norms.append([float(gradient.norm()) for gradient in gradients.values()])
        if self.before:
            pairs = ((gradients[layer], self.before[layer]) for layer in self.layers)
            self.cosines.append([float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs])
        self.before = gradients

    def _oscillating(self) -> float:
        """Share of the followed weights whose oscillation frequency is above what the recipe's freezing ends with."""
        states = self.freezing.states.values()
        return sum(int((state.frequency > OFTEN).sum()) for state in states) / sum(s.frozen.numel() for s in states)

    def variation(self) -> list[float]:
        """Of each layer: standard deviation of its gradient's norm over the iterations, divided by the mean."""
        norms = torch.tensor(self.norms)
        return cast(list[float], (norms.std(dim=0) / norms.mean(dim=0).clamp_min(1e-20)).tolist())


def observe(dataset: Path, pipeline: Pipeline, iterations: int) -> _Observed:
    """Train in one pipeline on the run's dataset, its sites and its initial scales."""
    context = context_of(dataset, pipeline, iterations)
    fitting = _Observed(context)
    for iteration in range(iterations):
        fitting.observe_step()
        print(f"\r{pipeline}: {iteration + 1}/{iterations}", end="", flush=True)
    print()
    return fitting


def context_of(run: Path, pipeline: Pipeline, iterations: int) -> TrainingContext:
    """The run's training, with another pipeline; nothing of the run is changed."""
    from sdq_deploy.training.context import TrainingSettings

    recorded = read_settings(run)
    overrides = {**_PLAIN, "fit.pipeline": pipeline, "fit.max_train_steps": iterations}
    settings = TrainingSettings(
        model=recorded["model"],
        out=run,
        recipe=load_recipe("shapes-64", overrides),
        prompts=tuple(recorded["prompts"]),
        seed=recorded["seed"],
    )
    source = load_source(resolve_model(settings.model))
    return TrainingContext(settings, source, make_accelerator(settings.recipe, cpu=True), Progress(disable=True))


def draw_gradients(fits: Mapping[str, _Observed], path: Path) -> None:
    """Figure 2: how much a layer's gradient changes from one iteration to the next."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    names = list(fits)
    left.boxplot([fit.variation() for fit in fits.values()], tick_labels=names, showfliers=False)
    left.set_title("variation of the gradient's norm, per layer (std / mean)")
    cosines = [[value for row in fit.cosines for value in row] for fit in fits.values()]
    right.boxplot(cosines, tick_labels=names, showfliers=False)
    right.set_title("cosine of consecutive gradients, per layer")
    figure.savefig(path, dpi=90)
    for name, fit, row in zip(names, fits.values(), cosines, strict=True):
        print(f"{name}: variation {_median(fit.variation()):.2f}, cosine {_median(row):.3f} (medians over layers)")


def draw_oscillation(fits: Mapping[str, _Observed], path: Path) -> None:
    """Figure 3: the loss, and the share of followed weights that oscillate."""
    figure = _figure(10, 4)
    panels = {"loss_output": "output loss", "oscillating": "share of weights that oscillate"}
    for axes, (field, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, fit in fits.items():
            axes.plot([record[field] for record in fit.records], label=name)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.legend(fontsize="small")
        if field == "loss_output":
            axes.set_yscale("log")
    figure.savefig(path, dpi=90)
    for name, fit in fits.items():
        print(f"{name}: {100 * fit.records[-1]['oscillating']:.2f} % of the followed weights oscillate at the end")


def draw_ranges(dataset: Path, batches: int, path: Path) -> None:
    """Figure 4: the range of the noisy input at each step, noised by a Gaussian or denoised step by step."""
    figure = _figure(10, 4)
    parts = {"parallel": "Gaussian-noised clean latents", "serial-to-parallel": "denoised step by step"}
    for axes, (pipeline, title) in zip(figure.subplots(1, 2, sharey=True), parts.items(), strict=True):
        context = context_of(dataset, cast(Pipeline, pipeline), batches)
        source = make_source(context, load_split(context.folder.dataset, "training"), cast(Pipeline, pipeline))
        drawn = [source.batch(iteration) for iteration in range(batches)]
        latents, steps = (torch.cat([getattr(batch, name) for batch in drawn]) for name in ("latents", "steps"))
        seen = sorted(set(steps.tolist()))
        at = [latents[steps == step].flatten() for step in seen]
        for low, high, shade in ((0.0, 1.0, 0.15), (0.01, 0.99, 0.3), (0.25, 0.75, 0.5)):
            bounds = [(float(x.quantile(low)), float(x.quantile(high))) for x in (v[:1_000_000] for v in at)]
            axes.fill_between(seen, *zip(*bounds, strict=True), alpha=shade, color="tab:blue", linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("step")
        widest = {step: float(values.abs().max()) for step, values in zip(seen, at, strict=True)}
        print(f"{title}: largest magnitude {widest[seen[0]]:.2f} at step {seen[0]}, {widest[seen[-1]]:.2f} at the last")
    figure.savefig(path, dpi=90)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", type=Path, required=True, help="a finished W4A8 training of shapes-64")
    parser.add_argument("--iterations", type=int, default=80)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    fits: dict[str, Any] = {name: observe(arguments.dataset, name, arguments.iterations) for name in PIPELINES}
    draw_gradients(fits, folder / "gradients.png")
    draw_oscillation(fits, folder / "oscillation.png")
    draw_ranges(arguments.dataset, 200, folder / "ranges.png")


if __name__ == "__main__":
    main()
