"""Training an MMDiT: quantizers on its joint attention, gradients under checkpointing, blocks, a whole small run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdq_deploy.training.methods.blocks import Samples, block_inputs, block_outputs, find_blocks
from sdq_deploy.training.run import run_training
from sdq_deploy.training.search import search_weight_scale
from sdq_deploy.training.student import Student
from sdq_engines.formats import PrecisionName
from sdq_export.checkpoint import load_checkpoint
from sdq_export.conditioning import Conditioning
from sdq_export.reference import build_reference
from sdq_export.sampler import compile_sampler
from sdq_export.sites import find_sites
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser
from sdq_export.writer import export_package
from tests.deploy.training.helpers import small_settings
from tests.deploy.training.test_modelopt_backend import initial_scales
from tests.nearness import is_the_same_quantized_network, relative

KEEP = ("pos_embed.proj", "proj_out")
STEPS = 4


@pytest.fixture(scope="module")
def source(tiny: Callable[[str], Path]) -> Source:
    return load_source(tiny("sd3"))


@pytest.fixture(scope="module")
def prompts(source: Source) -> Conditioning:
    return source.family.encode_prompts(["a red circle", "two boats", "", "green"])


def timesteps(source: Source) -> Tensor:
    return torch.from_numpy(compile_sampler(source.scheduler, STEPS).timesteps)


def make_student(source: Source, precision: PrecisionName = "w4a8") -> Student:
    spec = find_sites(source.denoiser, STEPS, precision, keep=KEEP, block_size=16)
    scales = initial_scales(source.denoiser, spec, search_weight_scale)
    return Student(source.denoiser, timesteps(source), spec, scales)


def latents_and_steps(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 16, 8, 8, generator=generator), torch.randperm(4, generator=generator)


@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])
def test_student_equals_the_reference_built_from_its_tensors(
    source: Source, prompts: Conditioning, precision: PrecisionName
) -> None:
    student = make_student(source, precision)
    reference = build_reference(source.own(source.family.denoiser), student.spec, student.tensors(), timesteps(source))
    with torch.no_grad():
        found = student.denoiser(*latents_and_steps(), prompts)
        wanted = reference(*latents_and_steps(), prompts)
        teacher = StepDenoiser(load_source(source.folder).denoiser, timesteps(source))
        exact = teacher(*latents_and_steps(), prompts)
    assert is_the_same_quantized_network(found, wanted, exact)
    assert relative(exact, found) > 0.01


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing(
    source: Source, prompts: Conditioning
) -> None:
    student = make_student(source)
    student.denoiser(*latents_and_steps(), prompts).square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in student.denoiser.named_parameters()}
    student.denoiser.zero_grad()
    student.denoiser.enable_gradient_checkpointing()
    loss = student.denoiser(*latents_and_steps(), prompts).square().mean()
    student.denoiser(*latents_and_steps(seed=5), prompts)  # other steps between forward and backward
    loss.backward()
    found = {name: parameter.grad for name, parameter in student.denoiser.named_parameters()}
    assert [name for name, gradient in wanted.items() if gradient is None] == []
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name, quantizer in student.activation_quantizers.items():
        assert (quantizer.log_scale.grad != 0).any(), name


def test_a_block_of_two_streams_is_compared_whole(source: Source, prompts: Conditioning) -> None:
    student = make_student(source)
    samples = Samples(*latents_and_steps(), prompts)
    blocks = {block.name: block for block in find_blocks(student.denoiser, student.spec, samples)}
    assert list(blocks) == [f"transformer_blocks.{index}" for index in range(3)]
    tokens = []
    for block in blocks.values():
        outputs = block_outputs(student.denoiser, block, block_inputs(student.denoiser, block, samples))
        tokens.append(outputs.shape[1])
    assert tokens == [16 + 272, 16 + 272, 16]  # the last block gives the image's alone


def test_a_small_training_is_exported(source: Source, tmp_path: Path) -> None:
    overrides = {"quantization.keep": list(KEEP), "sampling.scheduler": "default", "sampling.guidance_scale": 5.0}
    settings = small_settings(source.folder, tmp_path / "run", overrides)
    run_training(settings, cpu=True, quiet=True)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    stored = load_file(tmp_path / "run" / "checkpoint" / "denoiser.safetensors")
    assert not [name for name in stored if "norm1.linear" in name or "time_text_embed" in name]
    plan = compile_sampler(source.scheduler, 3)
    result = export_package(source, tmp_path / "package", plan, 5.0, checkpoint=checkpoint)
    assert result.report.passed
    assert result.package.manifest.precision == "w4a8"
