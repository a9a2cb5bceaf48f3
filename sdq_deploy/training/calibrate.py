"""Stage calibrate: initial scales. Weights by search over their values, activations from the serial dataset."""

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
from sdq_deploy.training.search import max_scale, search_weight_scale
from sdq_engines.files import atomic_write
from sdq_export.checkpoint import scale_key, weight_scale_key
from sdq_export.quantspec import ActivationSite, QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["activation_scales", "calibrate", "largest_activations", "weight_scales"]

#: Latents that go through the denoiser together while activations are sampled.
BATCH = 32


def calibrate(context: TrainingContext) -> None:
    """Compute the initial scales of every site and write them under the keys of the quantized checkpoint."""
    data = load_split(context.folder.dataset, "training")
    spec, settings = context.spec, context.recipe.calibrate
    with context.bar("calibrate", len(spec.weights) + context.plan.calls) as advance:
        scales = weight_scales(context.source.denoiser, spec, settings, context.device, advance)
        largest = largest_activations(context.teacher, spec, data, settings.samples_per_step, advance)
        scales |= activation_scales(largest, spec)
    if context.accelerator.is_main_process:
        with atomic_write(context.folder.scales) as temporary:
            save_file(scales, temporary)


def weight_scales(
    denoiser: nn.Module, spec: QuantSpec, settings: Calibrate, device: torch.device, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """`<layer>.weight_scale` of every weight site, f32 on the CPU."""
    scales: dict[str, Tensor] = {}
    for site in spec.weights:
        weight: Tensor = denoiser.get_parameter(f"{site.layer}.weight").to(device)
        found = search_weight_scale(
            weight, site.bits, site.block_size, points=settings.search_points, power=settings.search_power
        )
        scales[weight_scale_key(site.layer)] = found.cpu().contiguous()
        advance()
    return scales


@torch.no_grad()
def largest_activations(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, samples_per_step: int, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Run the floating-point denoiser over the dataset, step by step: the largest magnitude at each site, f32 [T].

    Both the prompt's and, under guidance, the empty prompt's pass are seen, as in inference. A step without latents
    leaves a 0.
    """
    largest = {site.name: torch.zeros(spec.num_steps) for site in spec.activations}
    device = next(denoiser.parameters()).device
    empty = data.empty.to(device) if data.guided else None
    for step in range(spec.num_steps):
        rows = data.at_step(step, samples_per_step)
        for part in torch.split(rows, BATCH) if len(rows) else ():  # the split of nothing is one empty part
            with _watching(denoiser, spec, largest, step):
                conditioning = data.conditioning[data.shard.prompt_ids[part]].to(device)
                steps = data.shard.steps[part].to(device)
                predict_outputs(denoiser, data.shard.latents[part].to(device), steps, conditioning, empty)
        advance()
    return largest


@contextmanager
def _watching(denoiser: StepDenoiser, spec: QuantSpec, largest: dict[str, Tensor], step: int) -> Iterator[None]:
    def watch(site: ActivationSite) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = largest[site.name]
            seen[step] = torch.maximum(seen[step], inputs[0].detach().float().abs().max().cpu())

        module: nn.Module = denoiser.model.get_submodule(site.consumers[0])
        return module.register_forward_pre_hook(look)

    handles = [watch(site) for site in spec.activations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_scales(largest: dict[str, Tensor], spec: QuantSpec) -> dict[str, Tensor]:
    """`<site name>.scale` f32 [G] of every activation site: what just holds the largest magnitude of the group's steps.

    Clipping for a lower error of the tensor itself costs the images: by the criterion of the weights, W8A8 ended
    2.6 dB further from the teacher. A group without latents takes its neighbour's scale.
    """
    scales: dict[str, Tensor] = {}
    for site in spec.activations:
        groups = torch.tensor(site.groups)
        tops = torch.stack([largest[site.name][groups == group].max() for group in range(site.num_groups)])
        scales[scale_key(site.name)] = _fill_gaps(max_scale(tops, site.bits), tops > 0)
    return scales


def _fill_gaps(scales: Tensor, known: Tensor) -> Tensor:
    """Replace unknown values by the nearest known group's."""
    places = known.nonzero().flatten()
    if not len(places):
        return scales
    nearest = (torch.arange(len(scales))[:, None] - places[None]).abs().argmin(dim=1)
    return scales[places[nearest]].contiguous()
