"""The student on ModelOpt's quantizers: what it computes, and that its gradients are right under checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sdq_deploy.training.student import Student, parameter_groups
from sdq_engines.formats import PrecisionName
from sdq_export.checkpoint import scale_key, weight_scale_key
from sdq_export.conditioning import Conditioning
from sdq_export.quantspec import QuantSpec
from sdq_export.reference import build_reference
from sdq_export.sites import find_sites
from sdq_export.stepping import StepDenoiser
from tests.nearness import FLOAT_NOISE, is_the_same_quantized_network, relative
from tests.tiny import prompt_rows, tiny_unet

TIMESTEPS = torch.tensor([801.0, 601.0, 401.0, 201.0])


def make_student(precision: PrecisionName = "w4a8") -> Student:
    from sdq_deploy.training.search import search_weight_scale

    unet = tiny_unet()
    spec = find_sites(unet, len(TIMESTEPS), precision)
    return Student(unet, TIMESTEPS, spec, initial_scales(unet, spec, search_weight_scale))


def initial_scales(unet: torch.nn.Module, spec: QuantSpec, search: object) -> dict[str, Tensor]:
    torch.manual_seed(1)
    scales = {
        weight_scale_key(site.layer): search(unet.get_submodule(site.layer).weight, site.format, points=10)
        for site in spec.weights
    }
    return scales | {scale_key(site.name): 0.02 + 0.02 * torch.rand(site.num_groups) for site in spec.activations}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    steps = torch.randperm(4, generator=generator)
    return latents, steps, prompt_rows(torch.randn(4, 16, 32, generator=generator))


def gradients(student: Student) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in student.denoiser.named_parameters()}


@pytest.mark.parametrize("precision", ["w4a8", "w8a8", "w4a16"])
def test_student_equals_the_reference_built_from_its_tensors(precision: PrecisionName) -> None:
    student = make_student(precision)
    reference = build_reference(tiny_unet(), student.spec, student.tensors(), TIMESTEPS)
    with torch.no_grad():
        found, wanted = student.denoiser(*inputs()), reference(*inputs())
        exact = StepDenoiser(tiny_unet(), TIMESTEPS)(*inputs())
    assert is_the_same_quantized_network(found, wanted, exact)


@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])
def test_every_parameter_gets_a_gradient(precision: PrecisionName) -> None:
    student = make_student(precision)
    student.denoiser(*inputs()).square().mean().backward()
    assert [name for name, parameter in student.denoiser.named_parameters() if parameter.grad is None] == []
    for quantizer in student.activation_quantizers.values():
        assert (quantizer.log_scale.grad != 0).any()


def test_gradient_checkpointing_changes_nothing() -> None:
    student = make_student()
    student.denoiser(*inputs()).square().mean().backward()
    wanted = gradients(student)
    student.denoiser.enable_gradient_checkpointing()
    for disturbed in (False, True):
        student.denoiser.zero_grad()
        loss = student.denoiser(*inputs()).square().mean()
        if disturbed:  # a second forward before the backward
            student.denoiser(*inputs(seed=5))
        loss.backward()
        found = gradients(student)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_query_key_and_value_share_one_quantizer() -> None:
    student = make_student()
    attention = student.denoiser.model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert attention.to_q.input_quantizer is attention.to_k.input_quantizer is attention.to_v.input_quantizer
    cross = student.denoiser.model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    assert not cross.to_k.weight_quantizer.is_enabled


def test_only_the_listed_layers_are_quantized() -> None:
    student = make_student()
    teacher = copy.deepcopy(make_student())
    with torch.no_grad(), student.only([]), teacher.only(["mid_block.resnets.0.conv1"]):
        plain, one = student.denoiser(*inputs()), teacher.denoiser(*inputs())
        wanted = StepDenoiser(tiny_unet(), TIMESTEPS)(*inputs())
    assert relative(plain, wanted) <= FLOAT_NOISE
    assert relative(one, plain) > 100 * FLOAT_NOISE


def test_scales_have_their_own_rates_and_no_decay() -> None:
    from sdq_deploy.recipes import load_recipe

    student = make_student()
    fit = load_recipe("shapes-64", {"fit.weight_decay": 0.1, "fit.weight_scale_lr.w4": 3e-3}).fit
    groups = parameter_groups(student, fit)
    assert sum(len(group["params"]) for group in groups) == len(list(student.denoiser.parameters()))
    by_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    layer = student.spec.weights[0].layer
    assert by_parameter[id(student.weight(layer))]["weight_decay"] == 0.1
    assert by_parameter[id(student.weight_quantizers[layer].log_scale)]["peak_lr"] == 3e-3
    for quantizer in student.activation_quantizers.values():
        assert by_parameter[id(quantizer.log_scale)]["weight_decay"] == 0.0
