"""Quantized checkpoints without training: weights by their largest value, activations by what random inputs reach."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sdq_engines.formats import PrecisionName
from sdq_export.checkpoint import (
    CheckpointInfo,
    QuantizedCheckpoint,
    SamplerSettings,
    SourceRef,
    quantize_weight,
    scale_key,
    weight_key,
    weight_scale_key,
)
from sdq_export.quantspec import QuantSpec
from sdq_export.sampler import SamplerPlan
from sdq_export.scales import largest_value_scale
from sdq_export.sites import find_sites
from sdq_export.smoothing import smooth_, smoothing_key
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser


def quantized_checkpoint(
    source: Source,
    plan: SamplerPlan,
    precision: PrecisionName,
    groups: int | None = None,
    *,
    smooth: bool = False,
    **options: Any,
) -> QuantizedCheckpoint:
    """A checkpoint of ``source`` whose per-step scales differ by up to a third between steps.

    Args:
        smooth: divide the channels of every activation site by random factors.
    """
    spec = find_sites(source.denoiser, plan.calls, precision, groups=groups, **options)
    factors = random_factors(source.denoiser, spec) if smooth else {}
    unet: Any = smooth_(copy.deepcopy(source.denoiser), spec, factors)
    stepped = StepDenoiser(copy.deepcopy(unet), torch.from_numpy(plan.timesteps))
    tensors = {name: parameter.detach().clone() for name, parameter in stepped.model.named_parameters()}
    for site in spec.weights:
        weight = unet.get_submodule(site.layer).weight
        tensors[weight_scale_key(site.layer)] = scale = largest_value_scale(weight, site)
        tensors[weight_key(site.layer)] = quantize_weight(weight, scale, site)
    tensors |= activation_scales(source, unet, spec) | factors
    info = CheckpointInfo(
        spec=spec,
        sampler=SamplerSettings(
            scheduler=plan.scheduler,
            config=plan.config,
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=4.0,
        ),
        source=SourceRef(model=source.model, sha256=source.sha256),
    )
    return QuantizedCheckpoint(info, tensors)


def random_factors(unet: Any, spec: QuantSpec) -> dict[str, Tensor]:
    """A factor between 1/4 and 4 for each channel of each activation site."""
    generator = torch.Generator().manual_seed(1)
    widths = {site.name: unet.get_submodule(site.consumers[0]).weight.shape[1] for site in spec.activations}
    return {
        smoothing_key(name): 4 ** (2 * torch.rand(width, generator=generator) - 1) for name, width in widths.items()
    }


def activation_scales(source: Source, unet: Any, spec: QuantSpec) -> dict[str, Tensor]:
    """[G] for each site: its largest value on random latents, times 0.85 to 1.15."""
    largest: dict[str, float] = {}
    hooks = []
    for site in spec.activations:

        def remember(_: Any, inputs: tuple[Tensor, ...], name: str = site.name) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        hooks.append(unet.get_submodule(site.consumers[0]).register_forward_pre_hook(remember))
    generator = torch.Generator().manual_seed(0)
    prompts = source.family.encode_prompts(["a red circle", "two stars", "", "boats"])
    channels, *size = source.family.latent_shape
    channels += source.family.network.extra_channels(unet)
    with torch.no_grad():
        for timestep in (1.0, 300.0, 900.0):
            latents = torch.randn(4, channels, *size, generator=generator)
            source.family.network.predict(unet, latents, torch.tensor(timestep), prompts)
    for hook in hooks:
        hook.remove()
    return {
        scale_key(site.name): largest[site.name] / 127 * (0.85 + 0.3 * torch.rand(site.num_groups, generator=generator))
        for site in spec.activations
    }
