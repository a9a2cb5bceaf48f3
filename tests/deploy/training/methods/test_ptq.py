"""Method ptq: every algorithm ends as a checkpoint that computes what was measured; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.methods.modelopt_scales import modelopt_scales, percentile_scales
from sdq_deploy.training.registry import method_named
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import scale_key, weight_scale_key
from sdq_export.sites import find_sites
from sdq_export.stepping import StepDenoiser
from tests.deploy.training.helpers import small_context
from tests.deploy.training.methods.runs import run_method, snr_of, status_of
from tests.tiny import tiny_unet

CASES = [
    ("search", "w4a8"),
    ("max", "w4a8"),
    ("mse", "w8a8"),
    ("percentile", "w4a8"),
    ("mse", "w4a16"),
    ("smoothquant", "w4a8"),
    ("awq", "w4a16"),
]


@pytest.mark.parametrize(("algorithm", "precision"), CASES)
def test_each_algorithm_ends_as_the_checkpoint_that_was_measured(
    tiny_sd: Path, finished_run: Path, tmp_path: Path, algorithm: str, precision: str
) -> None:
    out = tmp_path / "run"
    chosen = {"method": "ptq", "ptq.algorithm": algorithm, "quantization.precision": precision}
    checkpoint = run_method(tiny_sd, finished_run, out, chosen)
    status = status_of(out)
    assert status["method"] == checkpoint.info.notes["method"] == "ptq"
    assert "sensitivity" not in status["stages"]
    tried = status["stages"]["fit"]["measured"]["candidates"]
    assert len(tried) == {"percentile": 4, "smoothquant": 3}.get(algorithm, 1)
    best = max(entry["trajectory_snr_db"] for entry in tried)
    assert checkpoint.info.notes["trajectory_snr_db"]["best"] == best
    assert snr_of(tiny_sd, out, checkpoint) == pytest.approx(best, abs=1e-3)
    assert best > 8
    groups = 3 if algorithm == "search" else 1
    assert {site.num_groups for site in checkpoint.spec.activations} == {groups}


@pytest.fixture
def inputs(tiny_sd: Path, finished_run: Path) -> dict[str, Any]:
    context = small_context(tiny_sd, finished_run)
    spec = find_sites(tiny_unet(), 3, "w4a8", groups=1)
    return {
        "denoiser": StepDenoiser(context.source.denoiser, context.timesteps).eval(),
        "spec": spec,
        "data": load_split(finished_run / "dataset", "training"),
        "samples_per_step": 2,
    }


def test_percentiles_are_the_magnitudes_that_a_sort_finds(inputs: dict[str, Any]) -> None:
    seen: dict[str, list[Tensor]] = {}
    denoiser, spec = inputs["denoiser"], inputs["spec"]
    for site in spec.activations:
        denoiser.model.get_submodule(site.consumers[0]).register_forward_pre_hook(
            lambda _, args, name=site.name: seen.setdefault(name, []).append(args[0].detach().abs().flatten())
        )
    found = dict(percentile_scales(percentiles=(90.0, 99.9), **inputs))
    # Calibration ran three times over the data: weights, activations, histograms.
    for site in spec.activations:
        values = torch.cat(seen[site.name])
        for percentile, scales in found.items():
            wanted = float(torch.quantile(values, percentile / 100))
            assert float(scales[scale_key(site.name)]) * 127 == pytest.approx(wanted, rel=0.02)


def test_mse_weights_err_less_than_max(inputs: dict[str, Any]) -> None:
    from sdq_export.checkpoint import dequantize_weight, quantize_weight

    spec = inputs["spec"]
    errors = []
    for algorithm in ("max", "mse"):
        denoiser = StepDenoiser(tiny_unet(), torch.tensor([801.0, 401.0, 1.0])).eval()
        scales = modelopt_scales(algorithm=algorithm, **inputs | {"denoiser": denoiser})
        total = 0.0
        for site in spec.weights:
            weight, scale = tiny_unet().get_submodule(site.layer).weight, scales[weight_scale_key(site.layer)]
            rounded = dequantize_weight(quantize_weight(weight, scale, site), scale, site)
            total += float((rounded - weight).square().sum())
        errors.append(total)
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("overrides", "processes", "words"),
    [
        ({"method": "ptq", "ptq.algorithm": "svdquant"}, 1, "low-rank branch"),
        ({"method": "ptq", "ptq.algorithm": "awq"}, 1, "weights alone"),
        ({"method": "ptq", "ptq.algorithm": "smoothquant", "quantization.precision": "w4a16"}, 1, "quantized inputs"),
        ({"method": "ptq-reconstruction"}, 2, "one process"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(overrides: dict[str, Any], processes: int, words: str) -> None:
    recipe = load_recipe("shapes-64", overrides)
    with pytest.raises(SdqError, match=words):
        method_named(recipe.method).check(recipe, processes)


def test_switching_the_method_back_makes_the_result_again(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    """One folder, two methods: neither takes the other's result for its own."""
    from sdq_deploy.training.run import run_training
    from sdq_export.checkpoint import load_checkpoint
    from tests.deploy.training.helpers import small_settings

    out = tmp_path / "run"
    first = run_method(tiny_sd, finished_run, out, {"method": "ptq"})
    second = small_settings(tiny_sd, out, {"method": "ptq", "ptq.algorithm": "max"})
    assert run_training(second, resume=True, cpu=True, quiet=True) == ["calibrate", "fit", "save"]
    again = small_settings(tiny_sd, out, {"method": "ptq"})
    assert run_training(again, resume=True, cpu=True, quiet=True) == ["calibrate", "fit", "save"]
    found = load_checkpoint(out).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in first.tensors.items())
