"""QALoRA: the pair and its merged weight are one, gradients are right, rates follow the scales."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.lsq import broadcast_scale
from sdq_deploy.training.memory import state_bytes
from sdq_deploy.training.methods.adapters import attach_adapters, merge
from sdq_deploy.training.methods.efficientdm import adapter_groups, shared_fit
from sdq_deploy.training.student import Student
from sdq_engines.formats import PrecisionName
from sdq_export.checkpoint import weight_key
from sdq_export.reference import build_reference
from sdq_export.stepping import StepDenoiser
from tests.deploy.training.test_modelopt_backend import TIMESTEPS, inputs, make_student
from tests.nearness import is_the_same_quantized_network
from tests.tiny import tiny_unet


def adapted(precision: PrecisionName = "w4a8", rank: int = 4, size: float = 0.02) -> Student:
    """A student whose adapters have moved."""
    student = make_student(precision)
    attach_adapters(student, rank, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for quantizer in student.weight_quantizers.values():
            quantizer.adapter_up.copy_(size * torch.randn(quantizer.adapter_up.shape, generator=generator))
    return student


def test_at_the_start_nothing_has_changed() -> None:
    plain, student = make_student(), make_student()
    attach_adapters(student, 4, seed=0)
    with torch.no_grad():
        found, wanted = student.denoiser(*inputs()), plain.denoiser(*inputs())
        exact = StepDenoiser(tiny_unet(), TIMESTEPS)(*inputs())
    assert is_the_same_quantized_network(found, wanted, exact)
    assert student.tensors().keys() == plain.tensors().keys()


@pytest.mark.parametrize("precision", ["w4a8", "w8a8", "w4a16"])
def test_the_merged_weight_has_the_integers_of_the_pair(precision: PrecisionName) -> None:
    """Three ways to the same: what the checkpoint holds, a student of the merged weights, and the pair's forward."""
    student = adapted(precision)
    tensors = student.tensors()
    merged = tiny_unet()
    with torch.no_grad():
        for layer, quantizer in student.weight_quantizers.items():
            weight = merged.get_parameter(f"{layer}.weight")
            weight.copy_(merge(weight, quantizer.adapter_down, quantizer.adapter_up))
    again = Student(merged, TIMESTEPS, student.spec, {name: t for name, t in tensors.items() if "scale" in name})
    found = again.tensors()
    plain, moved = make_student(precision).tensors(), 0
    for site in student.spec.weights:
        assert torch.equal(found[weight_key(site.layer)], tensors[weight_key(site.layer)])
        moved += int((tensors[weight_key(site.layer)] != plain[weight_key(site.layer)]).sum())
    assert moved > 1000
    reference = build_reference(tiny_unet(), student.spec, tensors, TIMESTEPS)
    with torch.no_grad():
        found, wanted = student.denoiser(*inputs()), reference(*inputs())
        exact = StepDenoiser(tiny_unet(), TIMESTEPS)(*inputs())
    assert is_the_same_quantized_network(found, wanted, exact)


def test_gradients_of_the_pair_equal_finite_differences() -> None:
    """Through the straight-through estimator: rounding counts as the identity inside the range, as a constant beyond.

    Its surrogate <g, clip(W0 + B A)>, g being the gradient at the rounded weight, is differentiable; the gradients of
    A and B are the surrogate's finite differences in float64.
    """
    student = adapted(size=0.3)
    layer = "mid_block.resnets.0.conv1"
    quantizer, format = student.weight_quantizers[layer], student.spec.weight_sites[layer].format
    weight = student.weight(layer)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (quantizer.lsq(weight, quantizer) * direction).sum().backward()
    low, high = format.low, format.high
    scale = broadcast_scale(quantizer.log_scale.detach().double().exp(), weight.ndim)
    frozen, ahead = weight.detach().double(), direction.double()

    def surrogate(down: Tensor, up: Tensor) -> float:
        total = frozen + (up @ down).reshape(frozen.shape)
        return float((ahead * total.clamp(low * scale, high * scale)).sum())

    down, up = quantizer.adapter_down.detach().double(), quantizer.adapter_up.detach().double()
    generator = torch.Generator().manual_seed(4)
    for name, start in (("adapter_down", down), ("adapter_up", up)):
        gradient = getattr(quantizer, name).grad.double()
        for place in torch.randint(start.numel(), (20,), generator=generator).tolist():
            shifted = torch.zeros_like(start).view(-1)
            shifted[place] = 1e-7
            delta = shifted.view_as(start)
            pair = (down, up)
            above = surrogate(*(p + delta if p is start else p for p in pair))
            below = surrogate(*(p - delta if p is start else p for p in pair))
            assert float(gradient.view(-1)[place]) == pytest.approx((above - below) / 2e-7, rel=1e-3, abs=1e-3)
    total = frozen + (up @ down).reshape(frozen.shape)
    clipped = (total < low * scale) | (total > high * scale)
    assert 0.01 < float(clipped.double().mean()) < 0.99


def test_only_adapters_and_scales_learn() -> None:
    student = adapted()
    student.denoiser(*inputs()).square().mean().backward()
    learned = {name for name, parameter in student.denoiser.named_parameters() if parameter.grad is not None}
    assert learned == {
        name for name, _ in student.denoiser.named_parameters() if name.rpartition(".")[2] in
        ("adapter_down", "adapter_up", "log_scale")
    }  # fmt: skip
    in_groups = sum(len(group["params"]) for group in adapter_groups(student, load_recipe("shapes-64").efficientdm))
    assert in_groups == len(learned)


def test_an_adapters_rate_is_proportional_to_its_layers_mean_scale() -> None:
    student = adapted()
    settings = load_recipe("shapes-64", {"efficientdm.adapter_lr": 0.01}).efficientdm
    groups = {group["name"]: group for group in adapter_groups(student, settings)}
    rates = set()
    for layer in student.weight_quantizers:
        mean = float(student.weight_scale(layer).mean())
        assert groups[f"adapter of {layer}"]["peak_lr"] == pytest.approx(0.01 * mean)
        rates.add(groups[f"adapter of {layer}"]["peak_lr"])
    assert len(rates) > 10
    assert groups["weight scales"]["weight_decay"] == groups["activation scales"]["weight_decay"] == 0.0


def test_trainable_state_is_what_adam_keeps() -> None:
    student = adapted(rank=4)
    settings = load_recipe("shapes-64").efficientdm
    groups = adapter_groups(student, settings)
    optimizer = torch.optim.AdamW(groups)
    student.denoiser(*inputs()).square().mean().backward()
    optimizer.step()
    parameters = [parameter for group in groups for parameter in group["params"]]
    held = sum(p.nbytes + p.grad.nbytes for p in parameters)
    held += sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )  # fmt: skip
    assert state_bytes(p for p in student.denoiser.parameters() if p.requires_grad) == held
    assert held < state_bytes(copy.deepcopy(tiny_unet()).parameters()) / 2


def test_the_method_has_its_own_word_on_the_fit() -> None:
    recipe = load_recipe("shapes-64", {"fit.pipeline": "parallel", "fit.max_train_steps": 7})
    shared = shared_fit(recipe.fit, recipe.efficientdm)
    assert (shared.pipeline, shared.ild_weight, shared.max_train_steps) == ("serial-to-parallel", 0.0, 7)
