"""Factors of smoothed sites: for each site the migration strength, or none, that its layers' outputs suffer least from.

SmoothQuant has one strength for a model (its equation is in `sdq_deploy.training.balance`). A layer with outliers in
its input wants a large one, a layer with 4-bit weights a small one, so each site has its own, chosen by the squared
error of the quantized layers' outputs over the serial dataset, as AWQ (Lin et al., 2024) does for weights. No smoothing
is one of the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Calibrate
from sdq_deploy.training.balance import column_peaks, log_balance
from sdq_deploy.training.dataset import SerialData
from sdq_deploy.training.outputs import outputs_on
from sdq_deploy.training.search import max_scale, search_weight_scale
from sdq_export.checkpoint import dequantize_weight, quantize_weight
from sdq_export.quantspec import ActivationSite, QuantSpec
from sdq_export.rounding import fake_quantize
from sdq_export.smoothing import smoothing_key
from sdq_export.stepping import StepDenoiser

__all__ = ["channel_peaks", "search_smoothing", "smoothing_factors"]

#: Latents that go through the denoiser together.
BATCH = 32

#: Candidates of a weight scale while strengths are compared; the final scales are searched finely.
_POINTS = 16

#: Bounds of a factor, relative to the site's mean.
_LEAST, _MOST = 2.0**-10, 2.0**10


@torch.no_grad()
def channel_peaks(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, samples_per_step: int, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Run the floating-point denoiser over the dataset: the largest magnitude of each site's channels, f32 [T, C].

    Both the prompt's and, under guidance, the empty prompt's pass are seen, as in inference. A step without latents
    leaves zeros.
    """
    peaks: dict[str, Tensor] = {}

    def look(site: ActivationSite, step: int, module: nn.Module, x: Tensor, _: Tensor) -> None:
        found = _channels_last(module, x.abs()).flatten(0, -2).amax(dim=0)
        seen = peaks.setdefault(site.name, torch.zeros(spec.num_steps, len(found)))
        seen[step] = torch.maximum(seen[step], found.cpu())

    sites = [(site, site.consumers[0]) for site in spec.activations]
    for step in range(spec.num_steps):
        with _watching(denoiser, sites, step, look):
            _run_step(denoiser, data, step, samples_per_step)
        advance()
    return peaks


@torch.no_grad()
def search_smoothing(
    denoiser: StepDenoiser,
    spec: QuantSpec,
    data: SerialData,
    peaks: Mapping[str, Tensor],
    settings: Calibrate,
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """The best factors of each site by `smoothing_key`, f32 [C]; sites that are better off without have none.

    Args:
        denoiser: floating point.
        spec: the sites.
        data: the serial dataset.
        peaks: from `channel_peaks`.
        settings: strengths to try.
        advance: called once per strength.
    """
    best: dict[str, tuple[float, Tensor | None]] = {}
    sites = [site for site in spec.activations if _smoothable(site, spec)]
    if not sites:
        return {}
    for strength in (None, *settings.smoothing):
        candidate = {site.name: _candidate(denoiser, site, spec, peaks[site.name], strength) for site in sites}
        errors = _output_errors(denoiser, sites, data, candidate, max(1, settings.samples_per_step // 4))
        for name, error in errors.items():
            if name not in best or error < best[name][0]:
                best[name] = (error, candidate[name].factors)
        advance()
    return {smoothing_key(name): factors for name, (_, factors) in best.items() if factors is not None}


def _smoothable(site: ActivationSite, spec: QuantSpec) -> bool:
    """Whether all layers that read it have 8-bit weights.

    Smoothing helps the input at the weight's cost. On shapes-64 4-bit weights could not pay it: smoothed W4A8 started
    1.2 dB nearer to the teacher and after training ended 0.7 dB further (docs/benchmarks.md).
    """
    return all(spec.weight_sites[layer].format.bits >= 8 for layer in site.consumers)


@dataclass(frozen=True)
class _Candidate:
    """One way to quantize a site and the layers that read it.

    Attributes:
        factors: f32 [C]; None for no smoothing.
        scales: f32 [T], the activation's at each step.
        weights: layer -> its weight, smoothed and quantized.
    """

    factors: Tensor | None
    scales: Tensor
    weights: dict[str, Tensor]


def _candidate(
    denoiser: StepDenoiser, site: ActivationSite, spec: QuantSpec, peaks: Tensor, strength: float | None
) -> _Candidate:
    modules = {layer: denoiser.model.get_submodule(layer) for layer in site.consumers}
    raw = {layer: module.get_parameter("weight").detach().float() for layer, module in modules.items()}
    columns = column_peaks(raw.values()).cpu()
    factors = None if strength is None else smoothing_factors(peaks.amax(dim=0), columns, strength)
    divisor = torch.ones_like(columns) if factors is None else factors
    weights = {}
    for layer, weight in raw.items():
        spread = weight * divisor.to(weight).reshape(1, -1, *[1] * (weight.ndim - 2))
        place = spec.weight_sites[layer]
        scale = search_weight_scale(spread, place.format, points=_POINTS)
        weights[layer] = dequantize_weight(quantize_weight(spread, scale, place), scale, place)
    return _Candidate(factors, _group_scales(site, peaks / divisor), weights)


def smoothing_factors(peaks: Tensor, columns: Tensor, strength: float) -> Tensor:
    """SmoothQuant's factors, divided by their geometric mean so that weights keep their size; see `log_balance`."""
    logs, live = log_balance(peaks, columns, strength)
    if bool(live.any()):
        logs = torch.where(live, logs - logs[live].mean(), logs)
    return logs.exp().clamp(_LEAST, _MOST)


def _group_scales(site: ActivationSite, peaks: Tensor) -> Tensor:
    """f32 [T]: what just holds the largest channel of the step's group."""
    groups = torch.tensor(site.groups)
    tops = torch.stack([peaks[groups == group].max() for group in range(site.num_groups)])
    return max_scale(tops, site.format)[groups]


def _output_errors(
    denoiser: StepDenoiser,
    sites: Sequence[ActivationSite],
    data: SerialData,
    candidates: Mapping[str, _Candidate],
    samples_per_step: int,
) -> dict[str, float]:
    """Site -> summed squared error of its layers' outputs when only they are quantized."""
    errors = dict.fromkeys(candidates, 0.0)

    def look(site: ActivationSite, step: int, module: nn.Module, x: Tensor, output: Tensor) -> None:
        candidate = candidates[site.name]
        layer = names[module]
        scale = candidate.scales[step].to(x)
        if candidate.factors is not None:
            inverse = (1 / candidate.factors).to(x)
            x = x * (inverse.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d) else inverse)
        found = _apply(module, fake_quantize(x, scale, site.format), candidate.weights[layer].to(x))
        errors[site.name] += float((found - output).square().sum())

    watched = [(site, layer) for site in sites for layer in site.consumers]
    names = {denoiser.model.get_submodule(layer): layer for _, layer in watched}
    for step in range(denoiser.num_steps):
        with _watching(denoiser, watched, step, look):
            _run_step(denoiser, data, step, samples_per_step)
    return errors


def _apply(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    bias = module.bias if isinstance(module.bias, Tensor) else None
    if isinstance(module, nn.Conv2d):
        result: Tensor = module._conv_forward(x, weight, bias)
        return result
    return nn.functional.linear(x, weight, bias)


def _run_step(denoiser: StepDenoiser, data: SerialData, step: int, samples: int) -> None:
    rows = data.at_step(step, samples)
    for part in torch.split(rows, BATCH) if len(rows) else ():  # the split of nothing is one empty part
        outputs_on(denoiser, data, part)


@contextmanager
def _watching(
    denoiser: StepDenoiser,
    sites: list[tuple[ActivationSite, str]],
    step: int,
    look: Callable[[ActivationSite, int, nn.Module, Tensor, Tensor], None],
) -> Iterator[None]:
    """Have `look` see the input and the output of these layers, FP32, at this step."""

    def watch(site: ActivationSite, layer: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            look(site, step, module, inputs[0].detach().float(), output.detach().float())

        module: nn.Module = denoiser.model.get_submodule(layer)
        return module.register_forward_hook(hook)

    handles = [watch(site, layer) for site, layer in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels_last(module: nn.Module, x: Tensor) -> Tensor:
    return x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
