"""Teacher and reference on another device, without one: fake tensors know theirs, and refuse to meet another's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdq_deploy.cli import main
from sdq_engines.guidance import Guidance
from sdq_export.conditioning import Conditioning
from sdq_export.guidance import GuidedDenoiser
from sdq_export.reference import build_reference
from sdq_export.sampler import compile_sampler
from sdq_export.source import load_source
from tests.export.quantized import quantized_checkpoint

ELSEWHERE = "meta"
"""A fake tensor of this device meets one of the CPU as one of a GPU would: it raises."""


@pytest.fixture
def parameters_are_replaced() -> Iterator[None]:
    """A module that moves gets new parameters: a real one cannot hold fake data."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.usefixtures("parameters_are_replaced")
@pytest.mark.parametrize("name", ["sd", "sd-inpainting", "sdxl", "sd3"])
def test_everything_goes_to_the_device_and_the_answer_comes_back(
    tiny: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(tiny(name))
    plan = compile_sampler(source.scheduler, 3)
    keep = ("pos_embed.proj", "proj_out") if name == "sd3" else ("conv_in", "conv_out")
    checkpoint = quantized_checkpoint(source, plan, "w8a8", keep=keep)
    timesteps = torch.from_numpy(plan.timesteps)
    reference = build_reference(copy.deepcopy(source.denoiser), checkpoint.spec, checkpoint.tensors, timesteps)
    conditioning = source.family.encode_prompts([None, "a red circle"])
    channels = source.family.extra_channels
    latents = torch.randn(1, *source.family.latent_shape)
    extra = torch.randn(1, channels, *latents.shape[2:]) if channels else None
    places: list[str] = []
    forward = type(reference).forward

    def look(self: object, given: Tensor, steps: Tensor, prompts: Conditioning, *more: Tensor) -> Tensor:
        output = forward(self, given, steps, prompts, *more)  # type: ignore[arg-type]
        places.extend(each.device.type for each in (given, steps, *prompts.tensors.values(), *more, output))
        return output

    monkeypatch.setattr(type(reference), "forward", look)
    monkeypatch.setattr(torch, "autocast", lambda **_: contextlib.nullcontext())  # knows no such device
    with FakeTensorMode(allow_non_fake_inputs=True):
        reference.to(ELSEWHERE)
        guided = GuidedDenoiser(
            reference, Guidance.classifier_free(4.0), conditioning[1:], conditioning[:1], extra=extra
        )
        found = guided(latents, 1)
    assert set(places) == {ELSEWHERE}
    assert (found.device.type, found.shape, found.dtype) == ("cpu", latents.shape, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, sentence in ((["--device", "cuda"], "no CUDA device"), (["--device", "tpu"], "auto, cpu or cuda")):
        with pytest.raises(SystemExit) as exit_:
            main.run(["export", str(tiny_sd), "--out", str(tmp_path / "p"), *options])
        assert exit_.value.code == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
