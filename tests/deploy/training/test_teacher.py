"""The teacher in no more memory than is asked for: shared, in half precision, or away from the device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.counting import buffer_bytes
from sdq_deploy.training.device_state import device_state
from sdq_deploy.training.log import read_log
from sdq_deploy.training.losses import layer_outputs
from sdq_deploy.training.teacher import fit_teacher, make_teacher
from sdq_export.stepping import StepDenoiser
from tests.deploy.training.helpers import small_context, train
from tests.nearness import FLOAT_NOISE, relative
from tests.tiny import write_tiny_sd, write_tiny_sd3, write_tiny_sdxl

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[write_tiny_sd, write_tiny_sdxl, write_tiny_sd3], ids=["sd", "sdxl", "sd3"])
def context(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingContext:
    folder = tmp_path_factory.mktemp("teacher")
    write: Callable[[Path], Path] = request.param
    overrides: dict[str, Any] = {} if write is not write_tiny_sd3 else {"sampling.scheduler": "flow-euler"}
    return small_context(write(folder / "model"), folder / "run", overrides)


def outputs(context: TrainingContext, teacher: StepDenoiser, *, autocast: bool = False) -> dict[str, Tensor]:
    """What the teacher puts out, and what its layers do."""
    source = context.source
    latents = torch.randn(2, *source.family.latent_shape, generator=torch.Generator().manual_seed(1))
    prompts = source.family.encode_prompts(["a red circle", "blue"])
    layers = [site.layer for site in context.spec.weights][::7]
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        layer_outputs(teacher, layers) as seen,
    ):
        result = teacher(latents, torch.tensor([0, 2]), prompts)
    return {**seen, "result": result}


def weight_bytes(teacher: StepDenoiser) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in teacher.model.parameters())


def test_it_shares_the_checkpoints_weights_and_leaves_them_alone(context: TrainingContext) -> None:
    original = context.source.denoiser
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in original.state_dict().items()}
    teacher = make_teacher(original, context.timesteps, CPU)
    kept = dict(teacher.model.named_parameters())
    assert kept
    assert all(parameter.data_ptr() == before[name][0] for name, parameter in kept.items())
    make_teacher(original, context.timesteps, CPU, half=torch.bfloat16)
    make_teacher(original, context.timesteps, CPU, offload=True)
    for name, tensor in original.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_in_half_precision_it_says_what_autocast_would(context: TrainingContext) -> None:
    whole = make_teacher(context.source.denoiser, context.timesteps, CPU)
    half = make_teacher(context.source.denoiser, context.timesteps, CPU, half=torch.bfloat16)
    assert weight_bytes(half) < 0.56 * weight_bytes(whole)
    wanted, found = outputs(context, whole, autocast=True), outputs(context, half, autocast=True)
    exact = outputs(context, whole)
    for name, tensor in wanted.items():
        assert relative(found[name], tensor) <= 0.25 * relative(exact[name], tensor) > 1e-4, name


def test_offloaded_it_says_the_same_and_holds_nothing_between_calls(context: TrainingContext) -> None:
    whole = make_teacher(context.source.denoiser, context.timesteps, CPU)
    away = make_teacher(context.source.denoiser, context.timesteps, CPU, offload=True)
    wanted = outputs(context, whole)
    for _ in range(2):
        found = outputs(context, away)
        assert all(relative(found[name], tensor) <= FLOAT_NOISE for name, tensor in wanted.items())
        assert {parameter.device.type for parameter in away.model.parameters()} == {"meta"}


def test_the_forecast_knows_its_size(context: TrainingContext) -> None:
    recipe, original = context.recipe, context.source.denoiser
    for fit in (recipe.fit, recipe.fit.model_copy(update={"mixed_precision": "bf16"})):
        teacher = fit_teacher(original, context.timesteps, CPU, fit, layers=3)
        assert teacher is not None
        foreseen = device_state(
            make_teacher(original, context.timesteps, CPU), context.spec, recipe.model_copy(update={"fit": fit})
        )
        assert foreseen.teacher == weight_bytes(teacher) + buffer_bytes(teacher.model)


def test_nothing_that_the_dataset_answers_keeps_a_teacher(tiny_sd: Path, tmp_path: Path) -> None:
    context = small_context(tiny_sd, tmp_path)
    fit, original = context.recipe.fit, context.source.denoiser

    def asked(layers: int, **changes: Any) -> bool:
        return fit_teacher(original, context.timesteps, CPU, fit.model_copy(update=changes), layers) is not None

    assert asked(3)
    assert not asked(0)
    assert not asked(3, ild_weight=0.0)
    assert asked(0, pipeline="parallel")


def test_the_fit_is_the_same_with_the_teacher_offloaded(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    logs = []
    for offload in (False, True):
        out = Path(shutil.copytree(finished_run, tmp_path / str(offload)))
        changes = {"fit.max_train_steps": 2, "fit.mixed_precision": "bf16", "fit.gradient_checkpointing": True}
        train(tiny_sd, out, changes | {"fit.offload_teacher": offload})
        logs.append([record["loss"] for record in read_log(out / "log")[1:]])
    # rounding decisions of the grids may differ
    assert logs[0] == pytest.approx(logs[1], rel=0.05)
    assert len(logs[0]) == 2
