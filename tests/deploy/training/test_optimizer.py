"""AdamW with moments in 8 bits: a quarter of the bytes, nearly the same training, exact in the resume point."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdq_deploy.recipes.schema import Fit, OptimizerState
from sdq_deploy.training.forecast import forecast
from sdq_deploy.training.log import read_log
from sdq_deploy.training.optimizer import check_optimizer, make_optimizer, moment_bytes, optimizer_bytes
from sdq_deploy.training.run import run_training
from sdq_engines.errors import SdqError
from tests.deploy.training.helpers import small_settings

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def fit_of(state: OptimizerState, tmp_path: Path) -> Fit:
    return small_settings(tmp_path, tmp_path, {"fit.optimizer_state": state}).recipe.fit


def made(state: OptimizerState, tmp_path: Path) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """A weight that is quantized, one of a number of elements that no block divides, scales; two groups."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 32, 3, 3), (4099,), (20,))]
    groups: list[dict[str, Any]] = [
        {"params": weights[:2], "lr": 1e-3, "peak_lr": 1e-3, "weight_decay": 0.0, "name": "weights"},
        {"params": weights[2:], "lr": 1e-2, "peak_lr": 1e-2, "weight_decay": 0.1, "name": "scales"},
    ]
    return weights, make_optimizer(groups, fit_of(state, tmp_path), CPU)


def step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] / (1 + number)
    for weight in weights:
        weight.grad = weight.detach() + 0.1 * torch.randn(weight.shape, generator=generator)
    optimizer.step()


@needs_library
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_the_moments_take_what_is_reckoned(state: OptimizerState, tmp_path: Path) -> None:
    weights, optimizer = made(state, tmp_path)
    step(weights, optimizer, 0)
    maps = 2 * 256 * 4 if state == "8bit" else 0  # what the 256 values stand for, once for all
    assert optimizer_bytes(optimizer) == sum(moment_bytes(weight, state) for weight in weights) + maps


@needs_library
def test_steps_are_near_those_of_fp32_and_small_tensors_exact(tmp_path: Path) -> None:
    (exact, one), (found, other) = made("fp32", tmp_path), made("8bit", tmp_path)
    begin = [weight.detach().clone() for weight in exact]
    for number in range(10):
        step(exact, one, number)
        step(found, other, number)
    for index in (0, 1):
        moved = torch.linalg.vector_norm(exact[index] - begin[index])
        assert 0 < torch.linalg.vector_norm(found[index] - exact[index]) < 0.05 * moved
    torch.testing.assert_close(found[2], exact[2], rtol=1e-5, atol=1e-6)


@needs_library
def test_its_state_survives_the_resume_point_exactly(tmp_path: Path) -> None:
    wanted, undisturbed = made("8bit", tmp_path)
    found, interrupted = made("8bit", tmp_path)
    for number in range(6):
        step(wanted, undisturbed, number)
    for number in range(3):
        step(found, interrupted, number)
    file = io.BytesIO()
    torch.save({"weights": [weight.detach() for weight in found], "optimizer": interrupted.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, fresh = made("8bit", tmp_path)
    fresh.load_state_dict(saved["optimizer"])
    for weight, value in zip(resumed, saved["weights"], strict=True):
        weight.data.copy_(value)
    for number in range(3, 6):
        step(resumed, fresh, number)
    assert all(torch.equal(one, other) for one, other in zip(wanted, resumed, strict=True))


@needs_library
def test_a_fit_with_it_is_near_fp32s_and_continues_after_an_interrupt(
    tiny_sd: Path, finished_run: Path, tmp_path: Path
) -> None:
    from sdq_deploy.training.fit import Fitting

    def trained(name: str, stop_at: int | None = None) -> list[dict[str, Any]]:
        out = tmp_path / name
        if not out.exists():
            shutil.copytree(finished_run, out)
        settings = small_settings(tiny_sd, out, {"fit.optimizer_state": "8bit"})
        whole = Fitting._train_step

        def stopping(self: Fitting) -> dict[str, float]:
            if self.step == stop_at:
                raise KeyboardInterrupt
            return whole(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Fitting, "_train_step", stopping)
            assert run_training(settings, resume=True, cpu=True, quiet=True) == ["fit", "save"]
        return read_log(out / "log")

    undisturbed = trained("undisturbed")
    with pytest.raises(KeyboardInterrupt):
        trained("interrupted", stop_at=5)
    assert torch.load(tmp_path / "interrupted" / "fit" / "resume.pt", weights_only=True)["step"] == 4
    assert [r["loss"] for r in trained("interrupted")[1:]] == [r["loss"] for r in undisturbed[1:]]
    exact = [record["loss"] for record in read_log(finished_run / "log")[1:]]
    assert undisturbed[1]["loss"] == exact[0]
    assert undisturbed[-1]["loss"] == pytest.approx(exact[-1], rel=0.05)
    measured = json.loads((tmp_path / "undisturbed" / "run.json").read_text())["stages"]["fit"]["measured"]
    whole = json.loads((finished_run / "run.json").read_text())["stages"]["fit"]["measured"]
    assert measured["optimizer_state_bytes"] < 0.35 * whole["optimizer_state_bytes"]
    foreseen = forecast(small_settings(tiny_sd, tmp_path, {"fit.optimizer_state": "8bit"}))
    assert foreseen.optimizer_bytes == pytest.approx(measured["optimizer_state_bytes"], rel=0.05)
    assert foreseen.trainable_bytes == pytest.approx(measured["trainable_state_bytes"], rel=0.05)


def test_without_the_library_it_is_one_sentence_and_nothing_is_written(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name)
    )
    settings = small_settings(tiny_sd, tmp_path / "run", {"fit.optimizer_state": "8bit"})
    with pytest.raises(SdqError, match="needs bitsandbytes") as caught:
        run_training(settings, cpu=True, quiet=True)
    assert "sdq-deploy[train,8bit]" in caught.value.hint
    assert not (tmp_path / "run").exists()
    check_optimizer(fit_of("fp32", tmp_path))
