"""Adapters: the fused copy is what diffusers and peft make of them, and nothing of a file is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdq_deploy.adapters.original_names import unet_name
from sdq_deploy.lora import Lora, fuse_loras, parse_lora
from sdq_engines.errors import SdqError
from sdq_export.source import Source, load_source
from tests.single_files import mmdit_state, part_state

peft = pytest.importorskip("peft")

Tiny = Callable[[str], Path]
State = dict[str, Tensor]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block.resnets.0.conv1"
LAYERS = ["attn1.to_q", "attn2.to_v", "proj_in", "resnets.0.conv1", "time_emb_proj", "ff.net.2"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(model: Any, seed: int = 0) -> None:
    """Random values for the adapter's parameters, which peft starts with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)


def write_adapter(model: Path, path: Path, seed: int = 0) -> Path:
    """A random adapter of rank 2 on the UNet and on the text encoder, saved by diffusers."""
    source = load_source(model)
    pipeline = source.pipeline(source.scheduler)
    layers = {}
    for name, wanted in (("unet", ["to_q", "to_k", "conv1"]), ("text_encoder", ["q_proj", "fc1"])):
        part = getattr(pipeline, name)
        part.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=wanted))
        fill(part, seed)
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(part)
    type(pipeline).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


def fused(model: Path, folder: Path, *loras: Lora) -> Source:
    fuse_loras(load_source(model), loras, folder)
    return load_source(folder)


def images(pipeline: Any) -> Tensor:
    made = pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
    return torch.from_numpy(made.images)


def test_the_fused_copy_draws_what_diffusers_draws_with_the_adapters(tiny_sd: Path, tmp_path: Path) -> None:
    first, second = (write_adapter(tiny_sd, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    copy = fused(tiny_sd, tmp_path / "fused", Lora(first, 0.5), Lora(second, 0.8))
    found = images(copy.pipeline(copy.scheduler))
    source = load_source(tiny_sd)
    plain = images(source.pipeline(source.scheduler))
    live = source.pipeline(source.scheduler)
    live.load_lora_weights(str(first.parent), weight_name=first.name, adapter_name="first")
    live.load_lora_weights(str(second.parent), weight_name=second.name, adapter_name="second")
    live.set_adapters(["first", "second"], [0.5, 0.8])
    torch.testing.assert_close(found, images(live), rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    assert copy.denoiser.state_dict().keys() == load_source(tiny_sd).denoiser.state_dict().keys()
    before, after = load_source(tiny_sd).hashes, copy.hashes
    assert {part for part in after if after[part] != before[part]} == {"unet", "text_encoder"}


def kohya_adapter(source: Source, te: dict[str, str], sgm: bool) -> State:
    """An adapter by kohya's names on some layers of each part; SDXL's UNet by the original's names."""
    tensors: State = {}
    for part, prefix in {"unet": "lora_unet_", **te}.items():
        model = source.part(part)
        for number, (path, module) in enumerate(model.named_modules()):
            if not path.endswith(
                ("attn1.to_q", "attn2.to_k", "ff.net.2", "conv1", "q_proj", "k_proj", "v_proj", "out_proj", "fc2")
            ):
                continue
            named = unet_name(path, model) if sgm and part == "unet" else path
            assert named is not None
            if part != "unet" and not named.startswith("text_model."):
                named = "text_model." + named
            name = prefix + named.replace(".", "_")
            weight = module.weight
            kernel = [*weight.shape[2:]]
            tensors[f"{name}.lora_down.weight"] = random(2, weight.shape[1], *kernel, seed=number)
            tensors[f"{name}.lora_up.weight"] = random(weight.shape[0], 2, *[1] * len(kernel), seed=number + 1)
            tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


@pytest.mark.parametrize(
    ("kind", "te"),
    [
        ("sd", {"text_encoder": "lora_te_"}),
        ("sdxl", {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}),
    ],
)
def test_kohyas_names_mean_what_diffusers_takes_them_for(
    tiny: Tiny, kind: str, te: dict[str, str], tmp_path: Path
) -> None:
    source = load_source(tiny(kind))
    path = tmp_path / "kohya.safetensors"
    save_file(kohya_adapter(source, te, sgm=kind == "sdxl"), path)
    copy = fused(tiny(kind), tmp_path / "fused", Lora(path, 0.7))
    live = source.pipeline(source.scheduler)
    live.load_lora_weights(str(tmp_path), weight_name=path.name)
    live.fuse_lora(lora_scale=0.7)
    live.unload_lora_weights()
    for part in ("unet", *te):
        expected = getattr(live, part).state_dict()
        original, found = part_state(tiny(kind) / part), copy.part(part).state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert any((found[key] - original[key]).abs().max() > 1e-2 for key in original if key in found)


def peft_merged(model: Path, config: Any, folder: Path) -> tuple[State, State]:
    """The UNet with a random adapter merged by peft, and the adapter's tensors as peft saves them to `folder`."""
    unet = peft.get_peft_model(load_source(model).own("unet"), config)
    fill(unet)
    unet.save_pretrained(folder)
    merged: State = unet.merge_and_unload().state_dict()
    return merged, load_file(folder / "adapter_model.safetensors")


CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, alpha_pattern={"proj_in": 2}, use_rslora=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=LAYERS),
    "loha-tucker": peft.LoHaConfig(r=4, alpha=6, target_modules=LAYERS, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=LAYERS, decompose_both=True, decompose_factor=4),
    "lokr-tucker": peft.LoKrConfig(r=2, alpha=6, target_modules=LAYERS, use_effective_conv2d=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_is_fused_as_peft_merges_it(tiny_sd: Path, name: str, tmp_path: Path) -> None:
    merged, tensors = peft_merged(tiny_sd, CONFIGS[name], tmp_path / "peft")
    found = fused(tiny_sd, tmp_path / "fused", Lora(tmp_path / "peft/adapter_model.safetensors")).denoiser.state_dict()
    original = part_state(tiny_sd / "unet")
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)
    changed = {key for key in original if not torch.equal(original[key], found[key])}
    assert len(changed) == len({key.split(".hada")[0].split(".lora_")[0].split(".lokr")[0] for key in tensors})


def test_lycoris_names_mean_the_same_layers(tiny_sd: Path, tmp_path: Path) -> None:
    """peft's LoHa and DoRA, written as kohya and LyCORIS name them, alpha in the file."""
    for name, endings in (
        ("loha", {}),
        ("dora", {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}),
    ):
        merged, tensors = peft_merged(tiny_sd, CONFIGS[name], tmp_path / f"peft-{name}")
        renamed: State = {}
        for key, tensor in tensors.items():
            path, _, ending = key.removeprefix("base_model.model.").rpartition(".")
            if "lora_" in key:
                path, _, ending = key.removeprefix("base_model.model.").partition(".lora_")
                ending = endings.get(f"lora_{ending}", "dora_scale")
            flat = "lora_unet_" + path.replace(".", "_")
            magnitude = tensor.reshape(-1, *[1] * (3 if "conv1" in path or "proj_in" in path else 1))
            renamed[f"{flat}.{ending}"] = magnitude if ending == "dora_scale" else tensor
            renamed[f"{flat}.alpha"] = torch.tensor(6.0)
        save_file({key: tensor.contiguous() for key, tensor in renamed.items()}, tmp_path / f"{name}.safetensors")
        copy = fused(tiny_sd, tmp_path / f"fused-{name}", Lora(tmp_path / f"{name}.safetensors"))
        torch.testing.assert_close(copy.denoiser.state_dict(), merged, rtol=1e-5, atol=1e-5)


def test_whole_differences_and_magnitudes_of_inputs(tiny_sd: Path, tmp_path: Path) -> None:
    """LyCORIS' "full" and "norm", a LoCon in Tucker form, and a DoRA whose magnitudes are the inputs'."""
    original = part_state(tiny_sd / "unet")
    weight = original[f"{QUERY}.weight"]
    kernel = original[f"{CONVOLUTION}.weight"]
    out, channels = kernel.shape[:2]
    up, mid, down = random(out, 2, 1, 1), random(2, 2, 3, 3, seed=1), random(2, channels, 1, 1, seed=2)
    left, right, sizes = random(weight.shape[0], 2), random(2, weight.shape[1], seed=3), torch.rand(1, weight.shape[1])
    names = {path: "lora_unet_" + path.replace(".", "_") for path in (QUERY, CONVOLUTION, "conv_norm_out", "conv_out")}
    save_file(
        {
            f"{names[QUERY]}.lora_up.weight": left,
            f"{names[QUERY]}.lora_down.weight": right,
            f"{names[QUERY]}.dora_scale": sizes,
            f"{names[CONVOLUTION]}.lora_up.weight": up,
            f"{names[CONVOLUTION]}.lora_mid.weight": mid,
            f"{names[CONVOLUTION]}.lora_down.weight": down,
            f"{names['conv_norm_out']}.w_norm": random(*original["conv_norm_out.weight"].shape),
            f"{names['conv_norm_out']}.b_norm": random(*original["conv_norm_out.bias"].shape, seed=4),
            f"{names['conv_out']}.diff": random(*original["conv_out.weight"].shape),
            f"{names['conv_out']}.diff_b": random(*original["conv_out.bias"].shape, seed=4),
        },
        tmp_path / "a.safetensors",
    )
    found = fused(tiny_sd, tmp_path / "fused", Lora(tmp_path / "a.safetensors", 0.5)).denoiser.state_dict()
    moved = weight + 0.5 * left @ right
    columns = [moved[:, i] / moved[:, i].norm() * sizes[0, i] for i in range(weight.shape[1])]
    # a core between two 1x1 convolutions is the convolution of all three
    sample = random(1, channels, 5, 5, seed=5)
    through = torch.conv2d(torch.conv2d(torch.conv2d(sample, down), mid), up)
    delta = torch.conv2d(sample, found[f"{CONVOLUTION}.weight"] - kernel)
    torch.testing.assert_close(found[f"{QUERY}.weight"], torch.stack(columns, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta, 0.5 * through, rtol=1e-3, atol=1e-4)
    for layer in ("conv_norm_out", "conv_out"):
        for ending, seed in (("weight", 0), ("bias", 4)):
            key = f"{layer}.{ending}"
            expected = original[key] + 0.5 * random(*original[key].shape, seed=seed)
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)


def test_an_mmdits_joined_layers(tiny: Tiny, tmp_path: Path) -> None:
    """SD3's adapters by kohya's names change queries, keys and values at once; the last norms are in another order."""
    original = part_state(tiny("sd3") / "transformer")
    joined = mmdit_state(original)
    names = [
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.1.context_block.attn.qkv",
        "joint_blocks.0.x_block.mlp.fc1",
    ]
    names += ["joint_blocks.2.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1"]
    tensors: State = {}
    for number, name in enumerate(names):
        rows, columns = joined[f"{name}.weight"].shape
        up, down = random(rows, 2, seed=number), random(2, columns, seed=number + 1)
        flat = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
        joined[f"{name}.weight"] = joined[f"{name}.weight"] + up @ down
    save_file(tensors, tmp_path / "a.safetensors")
    copy = fused(tiny("sd3"), tmp_path / "fused", Lora(tmp_path / "a.safetensors"))
    found = mmdit_state(part_state(copy.folder / "transformer"))
    torch.testing.assert_close(found, joined, rtol=0, atol=1e-5)


def adapter_with(path: Path, **tensors: Tensor) -> Path:
    flat = "lora_unet_" + QUERY.replace(".", "_")
    whole = {f"{flat}.lora_up.weight": random(32, 2), f"{flat}.lora_down.weight": random(2, 32)}
    save_file(whole | {key.replace("QUERY", flat): tensor for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_unet_down_blocks_7_resnets_0_conv1.lora_up.weight": random(2, 2)}, r"1 of its 3 .*down_blocks_7"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": random(1)}, r"belong to no layer.*lora_te2_text_model"),
        ({"QUERY.oft_blocks": random(2, 2)}, r"no kind that can be fused.*oft_blocks"),
        ({"QUERY.lokr_w1": random(2, 2)}, "cannot be used beside them.*lokr_w1"),
        (
            {"lora_unet_conv_in.lora_up.weight": random(32, 2)},
            "lack the other tensors of their layer.*lora_unet_conv_in",
        ),
        ({"lora_unet_conv_in.diff": random(32, 4, 1, 1)}, r"conv_in is a change of \[32, 4, 1, 1\].*\[32, 4, 3, 3\]"),
        ({f"unet.{QUERY}.lora_A.weight": random(2, 32)}, "both change one layer"),
        ({"QUERY.dora_scale": random(1, 5)}, r"magnitude of \[1, 5\]"),
        ({"QUERY.alpha": torch.tensor(float("nan"))}, "not finite"),
        ({f"base_model.model.{CONVOLUTION}.diff": random(64, 64, 3, 3)}, "by how much it is scaled"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tiny_sd: Path, more: State, said: str, tmp_path: Path) -> None:
    path = adapter_with(tmp_path / "a.safetensors", **more)
    with pytest.raises(SdqError, match=said) as caught:
        fuse_loras(load_source(tiny_sd), [Lora(path)], tmp_path / "fused")
    assert str(path) in caught.value.message


def test_the_scale_that_diffusers_writes_beside_an_adapter_counts(tiny_sd: Path, tmp_path: Path) -> None:
    tensors = {f"unet.{QUERY}.lora_A.weight": random(2, 32), f"unet.{QUERY}.lora_B.weight": random(32, 2, seed=1)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    found = fused(tiny_sd, tmp_path / "fused", Lora(tmp_path / "a.safetensors")).denoiser
    delta = 4 * tensors[f"unet.{QUERY}.lora_B.weight"] @ tensors[f"unet.{QUERY}.lora_A.weight"]
    expected = part_state(tiny_sd / "unet")[f"{QUERY}.weight"] + delta
    torch.testing.assert_close(found.get_submodule(QUERY).weight, expected, rtol=0, atol=1e-5)


def test_reads_a_file_and_its_weight(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.touch()
    assert parse_lora(str(path)) == Lora(path, 1.0)
    assert parse_lora(f"{path}=0.8") == Lora(path, 0.8)
    for number in ("much", "nan"):
        with pytest.raises(SdqError, match="is no number"):
            parse_lora(f"{path}={number}")
    with pytest.raises(SdqError, match="does not exist"):
        parse_lora(str(tmp_path / "missing.safetensors"))
    (tmp_path / "style.ckpt").touch()
    with pytest.raises(SdqError, match="pickle"):
        parse_lora(str(tmp_path / "style.ckpt"))
