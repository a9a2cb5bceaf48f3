"""Scales as nvidia-modelopt's calibration finds them, at exactly our sites, read back under their checkpoint keys."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from sdq_deploy.training.dataset import SerialData
from sdq_deploy.training.modelopt_backend import import_modelopt, modelopt_bits, only_conv_and_linear
from sdq_deploy.training.outputs import outputs_on
from sdq_engines.formats import NumberFormat
from sdq_export.checkpoint import scale_key, weight_scale_key
from sdq_export.quantspec import QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["ModeloptAlgorithm", "modelopt_scales", "percentile_scales"]

ModeloptAlgorithm = Literal["max", "mse"]

#: ModelOpt's search of a weight's range: 33 candidates of at most the largest magnitude. Its defaults (steps of 0.1,
#: up to four times the largest magnitude) leave eight that clip.
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "max": {"method": "max"},
    "mse": {"method": "mse", "step_size": 0.025, "start_multiplier": 0.2, "stop_multiplier": 1.0},
}

#: Latents that go through the denoiser together.
BATCH = 16


def modelopt_scales(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, algorithm: ModeloptAlgorithm, samples_per_step: int
) -> dict[str, Tensor]:
    """Scales by ModelOpt's algorithms; the same for all steps, for ModelOpt knows none.

    Args:
        denoiser: floating-point; it is changed, hand in a copy.
        spec: the sites, with one scale group per activation.
        data: what the activations are calibrated on.
        algorithm: "max", or "mse", which searches the weights' range for the least squared error.
        samples_per_step: latents of each step that are shown.
    """
    _calibrate(denoiser, spec, data, algorithm, samples_per_step, "max")
    return weight_scales(denoiser, spec) | _activation_scales(denoiser, spec)


def percentile_scales(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, percentiles: tuple[float, ...], samples_per_step: int
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """(percentile, scales): activations by ModelOpt's histograms at each of the percentiles, weights by its mse.

    The arguments are those of `modelopt_scales`; the histograms are collected once.
    """
    _calibrate(denoiser, spec, data, "mse", samples_per_step, "histogram")
    weights = weight_scales(denoiser, spec)
    for percentile in percentiles:
        with _silence():
            for site in spec.activations:
                quantizer: Any = denoiser.model.get_submodule(f"{site.consumers[0]}.input_quantizer")
                quantizer.load_calib_amax("percentile", percentile=percentile)
        yield percentile, weights | _activation_scales(denoiser, spec)


def _calibrate(
    denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, algorithm: str, samples_per_step: int, calibrator: str
) -> None:
    """Insert ModelOpt's own quantizers at the sites and run its calibration."""
    mtq = import_modelopt()
    with only_conv_and_linear(), _silence():
        # Weights first: collecting a histogram has no place in ModelOpt's algorithms.
        config = {"quant_cfg": _config(spec), "algorithm": _ALGORITHMS[algorithm]}
        mtq.quantize(denoiser.model, config, lambda _: _run_over(denoiser, data, spec.num_steps, samples_per_step))
    if calibrator == "histogram":
        _collect_histograms(denoiser, spec, data, samples_per_step)


def _collect_histograms(denoiser: StepDenoiser, spec: QuantSpec, data: SerialData, samples_per_step: int) -> None:
    from modelopt.torch.quantization.calib import HistogramCalibrator

    quantizers: list[Any] = [
        denoiser.model.get_submodule(f"{site.consumers[0]}.input_quantizer") for site in spec.activations
    ]
    every: list[Any] = [module for name, module in denoiser.model.named_modules() if name.endswith("_quantizer")]
    states = [quantizer.is_enabled for quantizer in every]
    for quantizer in every:
        quantizer.disable()
    for quantizer, site in zip(quantizers, spec.activations, strict=True):
        quantizer._calibrator = HistogramCalibrator(modelopt_bits(site.format), None, False)
        quantizer.enable()
        quantizer.disable_quant()
        quantizer.enable_calib()
    with _silence():
        _run_over(denoiser, data, spec.num_steps, samples_per_step)
    for quantizer in quantizers:
        quantizer.disable_calib()
    for quantizer, enabled in zip(every, states, strict=True):
        if enabled:
            quantizer.enable()
            quantizer.enable_quant()


def weight_scales(denoiser: StepDenoiser, spec: QuantSpec) -> dict[str, Tensor]:
    """`<layer>.weight_scale` of every weight site after ModelOpt's calibration."""
    scales: dict[str, Tensor] = {}
    for weight in spec.weights:
        quantizer: Any = denoiser.model.get_submodule(f"{weight.layer}.weight_quantizer")
        scale = _scale_of(quantizer.amax, weight.format)
        rows = denoiser.model.get_submodule(weight.layer)._parameters["weight"].shape[0]
        scales[weight_scale_key(weight.layer)] = scale if weight.format.block_size is None else scale.reshape(rows, -1)
    return scales


def _activation_scales(denoiser: StepDenoiser, spec: QuantSpec) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}
    for site in spec.activations:
        amax = denoiser.model.get_submodule(f"{site.consumers[0]}.input_quantizer").amax
        scales[scale_key(site.name)] = _scale_of(amax, site.format)
    return scales


def _scale_of(amax: Tensor, format: NumberFormat) -> Tensor:
    """ModelOpt's step: the largest magnitude over Q_P. A channel of zeros gets any positive scale."""
    scale = amax.detach().float().cpu().flatten() / format.high
    return torch.where(scale > 0, scale, torch.ones_like(scale)).contiguous()


def _config(spec: QuantSpec) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for site in spec.weights:
        shape: dict[str, Any] = (
            {"axis": 0} if site.format.block_size is None else {"block_sizes": {-1: site.format.block_size}}
        )
        entries.append(
            {
                "quantizer_name": f"{site.layer}.weight_quantizer",
                "cfg": {"num_bits": modelopt_bits(site.format), **shape},
            }
        )
    entries += [
        {"quantizer_name": f"{layer}.input_quantizer", "cfg": {"num_bits": modelopt_bits(activation.format)}}
        for activation in spec.activations
        for layer in activation.consumers
    ]
    return entries


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """ModelOpt prints its progress."""
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _run_over(denoiser: StepDenoiser, data: SerialData, num_steps: int, samples_per_step: int) -> None:
    """Show the denoiser latents of every step, with and without their prompts."""
    rows = torch.cat([data.at_step(step, samples_per_step) for step in range(num_steps)])
    for part in torch.split(rows, BATCH):
        outputs_on(denoiser, data, part)
