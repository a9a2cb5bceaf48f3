"""LoRA adapters: the fused copy draws what diffusers draws with the adapter, and is a model like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq_deploy.lora import Lora, fuse_loras, parse_lora
from sdq_engines.errors import SdqError
from sdq_export.source import load_source

peft = pytest.importorskip("peft")


def write_adapter(model: Path, path: Path, seed: int = 0) -> Path:
    """A random adapter of rank 2 on every attention of the UNet, saved by diffusers."""
    source = load_source(model)
    pipeline = source.pipeline(source.scheduler)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"])
    pipeline.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    layers = peft.get_peft_model_state_dict(pipeline.unet)
    type(pipeline).save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name)
    return path


def images(pipeline: Any) -> torch.Tensor:
    made = pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
    return torch.from_numpy(made.images)


def test_the_fused_copy_draws_what_diffusers_draws_with_the_adapters(tiny_sd: Path, tmp_path: Path) -> None:
    first, second = (write_adapter(tiny_sd, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    folder = fuse_loras(tiny_sd, None, [Lora(first, 0.5), Lora(second, 0.8)], tmp_path / "fused")
    fused = load_source(folder)
    found = images(fused.pipeline(fused.scheduler))
    source = load_source(tiny_sd)
    plain = images(source.pipeline(source.scheduler))
    live = source.pipeline(source.scheduler)
    live.load_lora_weights(str(first.parent), weight_name=first.name, adapter_name="first")
    live.load_lora_weights(str(second.parent), weight_name=second.name, adapter_name="second")
    live.set_adapters(["first", "second"], [0.5, 0.8])
    torch.testing.assert_close(found, images(live), rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    assert fused.denoiser.state_dict().keys() == load_source(tiny_sd).denoiser.state_dict().keys()
    assert fused.sha256 != load_source(tiny_sd).sha256
    assert "1.safetensors (0.5), 2.safetensors (0.8)" in (folder / "NOTICE").read_text(encoding="utf-8")


def test_a_finished_copy_is_kept_and_another_one_is_made_anew(tiny_sd: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_sd, tmp_path / "a.safetensors")
    weights = (
        fuse_loras(tiny_sd, None, [Lora(adapter)], tmp_path / "fused") / "unet/diffusion_pytorch_model.safetensors"
    )
    written = weights.stat().st_mtime_ns
    fuse_loras(tiny_sd, None, [Lora(adapter)], tmp_path / "fused")
    assert weights.stat().st_mtime_ns == written
    fuse_loras(tiny_sd, None, [Lora(adapter, 0.1)], tmp_path / "fused")
    assert weights.stat().st_mtime_ns != written


def test_what_does_not_fit_is_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_sd, tmp_path / "a.safetensors")
    wider = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in load_file(adapter).items()}
    save_file(wider, tmp_path / "wider.safetensors")
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("wider", "other"):
        with pytest.raises(SdqError, match=f"{name}.safetensors does not fit"):
            fuse_loras(tiny_sd, None, [Lora(tmp_path / f"{name}.safetensors")], tmp_path / "fused")


def test_reads_a_file_and_its_weight(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.touch()
    assert parse_lora(str(path)) == Lora(path, 1.0)
    assert parse_lora(f"{path}=0.8") == Lora(path, 0.8)
    with pytest.raises(SdqError, match="is no number"):
        parse_lora(f"{path}=much")
    with pytest.raises(SdqError, match="does not exist"):
        parse_lora(str(tmp_path / "missing.safetensors"))
    (tmp_path / "style.ckpt").touch()
    with pytest.raises(SdqError, match="pickle"):
        parse_lora(str(tmp_path / "style.ckpt"))
