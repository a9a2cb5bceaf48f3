"""The gate on a budget of calls: which places it looks at, how the teacher gets there, what it lets pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.guidance import Guidance
from sdq_export.engines import check_built_engine
from sdq_export.parity.budget import choose_gate
from sdq_export.parity.distances import compare_distances
from sdq_export.parity.samples import parity_prompts, record_teacher
from sdq_export.sampler import compile_sampler, make_scheduler
from sdq_export.sampler.jump import clean_and_noise, jump
from sdq_export.settings import PackageSettings
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser
from sdq_export.writer import ExportResult, export_package
from tests.export.conftest import GUIDANCE, plan_of
from tests.export.quantized import quantized_checkpoint

SMALL, LARGE = (4, 8, 8), (4, 64, 64)
MANY = 860_000_000


def test_a_small_denoiser_is_looked_at_in_full_and_a_large_one_at_three_places() -> None:
    full = choose_gate("auto", 20, SMALL, 16_000_000, True)
    assert (full.steps, full.samples, full.site_steps) == (tuple(range(20)), 8, [0, 10, 19])
    few = choose_gate("auto", 20, LARGE, MANY, True)
    assert (few.steps, few.samples, few.site_steps) == ((0, 10, 19), 1, [10])
    assert choose_gate("auto", 20, LARGE, MANY, False).calls(False) <= 12
    assert choose_gate("full", 20, LARGE, MANY, True).steps == tuple(range(20))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_budget_buys_steps_then_images_and_is_kept(quantized: bool) -> None:
    before = 0
    for budget in (30, 60, 100, 150, 400):
        gate = choose_gate(budget, 20, SMALL, MANY, quantized)
        assert gate.steps[0] == 0
        assert gate.steps[-1] == 19
        assert before <= gate.calls(quantized) <= budget + 8
        before = gate.calls(quantized)
    assert len(gate.steps) == 20
    assert gate.samples > 1
    assert choose_gate(12, 2, SMALL, MANY, quantized).steps == (0, 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ddim", {}),
        ("ddim", {"prediction_type": "v_prediction"}),
        ("ddim", {"prediction_type": "sample"}),
        ("euler", {}),
        ("euler", {"prediction_type": "v_prediction"}),
        ("dpmpp-2m", {"prediction_type": "v_prediction"}),
        ("flow-euler", {}),
    ],
)
def test_a_model_that_is_right_stays_on_the_schedulers_own_path(name: str, changes: dict[str, Any]) -> None:
    """An output that names the noise and the image exactly leads to diffusers' own mix of the two at a later step."""
    schedule = {} if name.startswith("flow") else {"beta_schedule": "scaled_linear", "clip_sample": False}
    plan = compile_sampler(make_scheduler(name, {**schedule, **changes}), 10)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (float(value) for value in plan.noising[3])
    length = float(np.hypot(a, b))
    outputs = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": (a * noise - b * clean) / length,
        "flow": noise - clean,
    }
    kind = "flow" if name.startswith("flow") else changes.get("prediction_type", "epsilon")
    found = clean_and_noise(plan, a * clean + b * noise, outputs[kind], 3)
    torch.testing.assert_close(found, (clean, noise), atol=1e-4, rtol=1e-4)
    scheduler = make_scheduler(name, {**schedule, **changes})
    scheduler.set_timesteps(10)
    add = getattr(scheduler, "add_noise", None)
    timestep = scheduler.timesteps[7:8]
    wanted = add(clean, noise, timestep) if add else scheduler.scale_noise(clean, timestep, noise)
    torch.testing.assert_close(jump(plan, a * clean + b * noise, outputs[kind], 3, 7), wanted, atol=1e-3, rtol=1e-3)


def test_the_teacher_is_called_at_the_gates_steps_alone(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(source, "euler", 12)
    gate = choose_gate(12, plan.calls, SMALL, MANY, True)
    calls: list[int] = []
    forward = StepDenoiser.forward

    def counted(self: StepDenoiser, latents: Any, steps: Any, *rest: Any) -> Any:
        (step,) = steps.unique().tolist()  # all rows of a call are of one step
        calls.append(step)
        return forward(self, latents, steps, *rest)

    monkeypatch.setattr(StepDenoiser, "forward", counted)
    conditioning = source.family.encode_prompts(parity_prompts(("a red circle",), gate.samples))
    samples = record_teacher(source, plan, Guidance.classifier_free(GUIDANCE), conditioning, gate)
    assert calls == list(gate.steps) == [0, 6, 11]
    for step in gate.steps:  # as the scheduler scales its inputs: of about unit size at every noise level
        assert 0.3 < float(samples.model_inputs[step].std()) < 30
        assert samples.distances(samples.outputs[step], step).max() == 0


@pytest.fixture(scope="module")
def budgeted(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """W4A8 through a gate of twelve calls."""
    plan = plan_of(source, "ddim", 6)
    out = tmp_path_factory.mktemp("budget") / "package"
    checkpoint = quantized_checkpoint(source, plan, "w4a8")
    return export_package(source, out, plan, GUIDANCE, PackageSettings(gate=12), checkpoint=checkpoint)


def test_a_package_says_how_little_was_looked_at(budgeted: ExportResult) -> None:
    parity = budgeted.package.manifest.fidelity["parity"]
    assert parity["float_graph"]["steps"] == parity["quantized_graph"]["steps"] == [0, 2, 5]
    assert parity["site_integers"]["steps"] == [2]
    low, high = parity["quantized_graph"]["details"]["interval"]
    assert low <= parity["quantized_graph"]["overall"] <= high
    assert parity["quantized_graph"]["details"]["samples"] == 1


def test_its_engine_is_held_to_the_same_places(budgeted: ExportResult) -> None:
    package, criterion = check_built_engine(build_engine(budgeted.package, "onnxruntime"), "onnxruntime", budgeted)
    assert criterion is not None
    assert criterion.steps == (0, 2, 5)
    assert "engine:onnxruntime" in package.manifest.fidelity["parity"]


def test_a_wrong_layer_is_caught_on_a_budget(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdq_export.passes.quantize_weights import QuantizeWeights

    plan = plan_of(source, "ddim", 6)
    checkpoint = quantized_checkpoint(source, plan, "w4a8")
    original = QuantizeWeights.__init__
    layer = checkpoint.spec.weights[5].layer

    def wrong(self: QuantizeWeights, spec: Any, tensors: Any) -> None:
        key = f"{layer}.weight_scale"
        assert key in tensors
        original(self, spec, {**tensors, key: tensors[key] * 1.001})

    monkeypatch.setattr(QuantizeWeights, "__init__", wrong)
    with pytest.raises(SdqError, match=r"(?s)layer's output|without activation quantization"):
        export_package(source, tmp_path / "package", plan, GUIDANCE, PackageSettings(gate=12), checkpoint=checkpoint)
    assert not (tmp_path / "package").exists()


def test_few_places_are_forgiven_their_scatter_and_no_more() -> None:
    wanted = np.array([[0.10], [0.05], [0.04]])
    scattered = compare_distances("x", "x", 1.05, (0, 1, 2), wanted * [[1.12], [1.02], [1.06]], wanted)
    assert scattered.overall is not None
    assert scattered.overall > 1.05
    assert scattered.passed
    assert not compare_distances("x", "x", 1.05, (0, 1, 2), wanted * 1.07, wanted).passed
    assert not compare_distances("x", "x", 1.05, (0, 1, 2), wanted * [[1.3], [1.0], [1.1]], wanted).passed
    assert compare_distances("x", "x", 1.05, (0,), wanted[:1], wanted[:1]).passed
    nothing = compare_distances("x", "x", 1.05, (0, 1, 2), wanted * np.nan, wanted)
    assert not nothing.passed
