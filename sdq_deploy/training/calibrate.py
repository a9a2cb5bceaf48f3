"""Stage calibrate: initial scales. Weights by search over their values, activations over the serial dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Calibrate
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData, load_split
from sdq_deploy.training.guidance import predict_outputs
from sdq_deploy.training.search import search_scale, search_weight_scale
from sdq_engines.files import atomic_write
from sdq_export.checkpoint import scale_key, weight_scale_key
from sdq_export.quantspec import ActivationSite, QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["ActivationSample", "activation_scales", "calibrate", "sample_activations", "weight_scales"]

#: Magnitudes kept per site and step: enough for the shape of the distribution, its maximum is kept beside them.
VALUES_PER_STEP = 8192

#: Latents that go through the denoiser together while activations are sampled.
BATCH = 32


class ActivationSample:
    """What one site sees at each step: values chosen at random and the largest magnitude.

    Attributes:
        values: per step, f32 [K] of magnitudes.
        largest: f32 [T].
    """

    def __init__(self, steps: int) -> None:
        self.values: list[list[Tensor]] = [[] for _ in range(steps)]
        self.largest = torch.zeros(steps)

    def add(self, x: Tensor, step: int, limit: int) -> None:
        """Add `limit` values of an activation of one step."""
        magnitudes = x.detach().float().abs().flatten()
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(magnitudes.numel(), (min(limit, magnitudes.numel()),), generator=generator)
        self.values[step].append(magnitudes[chosen.to(magnitudes.device)].cpu())
        self.largest[step] = torch.maximum(self.largest[step], magnitudes.max().cpu())

    def by_group(self, groups: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """(values [K'], largest []) of each scale group."""
        for group in range(groups[-1] + 1):
            members = [step for step, own in enumerate(groups) if own == group]
            yield torch.cat([part for step in members for part in self.values[step]]), self.largest[members].max()


def calibrate(context: TrainingContext) -> None:
    """Compute the initial scales of every site and write them under the keys of the quantized checkpoint."""
    data = load_split(context.folder.dataset, "training")
    spec, settings = context.spec, context.recipe.calibrate
    with context.bar("calibrate", len(spec.weights) + context.plan.calls + len(spec.activations)) as advance:
        scales = weight_scales(context.source.unet, spec, settings, context.device, advance)
        samples = sample_activations(context.teacher, spec, data, settings.samples_per_step, advance)
        scales |= activation_scales(samples, spec, settings, advance)
    if context.accelerator.is_main_process:
        with atomic_write(context.folder.scales) as temporary:
            save_file(scales, temporary)


def weight_scales(
    unet: nn.Module, spec: QuantSpec, settings: Calibrate, device: torch.device, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """`<layer>.weight_scale` of every weight site, f32 on the CPU."""
    scales: dict[str, Tensor] = {}
    for site in spec.weights:
        weight: Tensor = unet.get_parameter(f"{site.layer}.weight").to(device)
        found = search_weight_scale(
            weight, site.bits, site.block_size, points=settings.search_points, power=settings.search_power
        )
        scales[weight_scale_key(site.layer)] = found.cpu().contiguous()
        advance()
    return scales


@torch.no_grad()
def sample_activations(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, samples_per_step: int, advance: Callable[[], None]
) -> dict[str, ActivationSample]:
    """Run the floating-point denoiser over the dataset, step by step, and look at what reaches each site.

    Both the prompt's and, under guidance, the empty prompt's pass are seen, as in inference.
    """
    samples = {site.name: ActivationSample(spec.num_steps) for site in spec.activations}
    device = next(denoiser.parameters()).device
    empty = data.empty.to(device) if data.guided else None
    for step in range(spec.num_steps):
        rows = data.at_step(step, samples_per_step)
        parts = torch.split(rows, BATCH)
        for part in parts:
            with _watching(denoiser, spec, samples, step, VALUES_PER_STEP // len(parts)):
                embeddings = data.embeddings[data.shard.prompt_ids[part]].to(device)
                steps = data.shard.steps[part].to(device)
                predict_outputs(denoiser, data.shard.latents[part].to(device), steps, embeddings, empty)
        advance()
    return samples


@contextmanager
def _watching(
    denoiser: StepDenoiser, spec: QuantSpec, samples: dict[str, ActivationSample], step: int, limit: int
) -> Iterator[None]:
    def watch(site: ActivationSite) -> torch.utils.hooks.RemovableHandle:
        module: nn.Module = denoiser.unet.get_submodule(site.consumers[0])
        return module.register_forward_pre_hook(lambda _, args: samples[site.name].add(args[0], step, limit))

    handles = [watch(site) for site in spec.activations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_scales(
    samples: dict[str, ActivationSample], spec: QuantSpec, settings: Calibrate, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """`<site name>.scale` f32 [G] of every activation site; a group without latents takes its neighbour's."""
    scales: dict[str, Tensor] = {}
    for site in spec.activations:
        found = []
        for values, largest in samples[site.name].by_group(site.groups):
            if not values.numel():
                found.append(torch.full((1,), float("nan")))
                continue
            rows = values[None]
            found.append(
                search_scale(rows, site.bits, settings.search_points, settings.activation_power, largest=largest[None])
            )
        scales[scale_key(site.name)] = _fill_gaps(torch.cat(found))
        advance()
    return scales


def _fill_gaps(scales: Tensor) -> Tensor:
    """Replace NaN by the nearest group's value."""
    known = (~scales.isnan()).nonzero().flatten()
    nearest = (torch.arange(len(scales))[:, None] - known[None]).abs().argmin(dim=1)
    return scales[known[nearest]].contiguous()
