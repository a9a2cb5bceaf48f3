"""Stage calibrate: initial scales. Weights by search over their values, activations from the serial dataset."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Calibrate
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData, load_split
from sdq_deploy.training.search import max_scale, search_weight_scale
from sdq_deploy.training.smoothing_search import channel_peaks, search_smoothing
from sdq_engines.files import atomic_write
from sdq_export.checkpoint import scale_key, weight_scale_key
from sdq_export.quantspec import QuantSpec
from sdq_export.smoothing import smooth_, smoothed_sites, smoothing_key
from sdq_export.stepping import StepDenoiser

__all__ = ["activation_scales", "calibrate", "largest_activations", "weight_scales"]


def calibrate(context: TrainingContext) -> None:
    """Compute the initial scales of every site, and factors, under the keys of the quantized checkpoint."""
    data = load_split(context.folder.dataset, "training")
    spec, settings = context.spec, context.recipe.calibrate.model_copy(update={"smoothing": context.smoothing})
    tries = len(settings.smoothing) + 1 if settings.smoothing else 0
    with context.bar("calibrate", len(spec.weights) + context.plan.calls + tries) as advance:
        peaks = channel_peaks(context.teacher, spec, data, settings.samples_per_step, advance)
        factors = search_smoothing(context.teacher, spec, data, peaks, settings, advance) if tries else {}
        for name in smoothed_sites(spec, factors):
            peaks[name] = peaks[name] / factors[smoothing_key(name)]
        original = context.source.denoiser
        smoothed = smooth_(copy.deepcopy(original), spec, factors) if factors else original
        scales = weight_scales(smoothed, spec, settings, context.device, advance)
        scales |= activation_scales({name: seen.amax(dim=1) for name, seen in peaks.items()}, spec) | factors
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
        found = search_weight_scale(weight, site.format, points=settings.search_points, power=settings.search_power)
        scales[weight_scale_key(site.layer)] = found.cpu().contiguous()
        advance()
    return scales


def largest_activations(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, samples_per_step: int, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """The largest magnitude at each site and step over the serial dataset, f32 [T]: see `channel_peaks`."""
    peaks = channel_peaks(denoiser, spec, data, samples_per_step, advance)
    return {name: seen.amax(dim=1) for name, seen in peaks.items()}


def activation_scales(largest: dict[str, Tensor], spec: QuantSpec) -> dict[str, Tensor]:
    """`<site name>.scale` f32 [G] of every activation site: what just holds the largest magnitude of the group's steps.

    Clipping for a lower error of the tensor itself costs the images: by the criterion of the weights, W8A8 ended
    2.6 dB further from the teacher. A group without latents takes its neighbour's scale.
    """
    scales: dict[str, Tensor] = {}
    for site in spec.activations:
        groups = torch.tensor(site.groups)
        tops = torch.stack([largest[site.name][groups == group].max() for group in range(site.num_groups)])
        scales[scale_key(site.name)] = _fill_gaps(max_scale(tops, site.format), tops > 0)
    return scales


def _fill_gaps(scales: Tensor, known: Tensor) -> Tensor:
    """Replace unknown values by the nearest known group's."""
    places = known.nonzero().flatten()
    if not len(places):
        return scales
    nearest = (torch.arange(len(scales))[:, None] - places[None]).abs().argmin(dim=1)
    return scales[places[nearest]].contiguous()
