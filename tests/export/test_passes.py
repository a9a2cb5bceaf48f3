"""The graph passes on a real captured UNet, against torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.backends.onnxruntime import open_session
from sdq_engines.errors import SdqError
from sdq_engines.lowering.graph import array_of, quantized_layers
from sdq_engines.lowering.save import save_graph
from sdq_export.checkpoint import scale_key
from sdq_export.conditioning import TEXT_INPUT
from sdq_export.denoiser import DenoiserGraphs, build_denoiser, run_passes
from sdq_export.families import network_of
from sdq_export.families.network import GraphCuts
from sdq_export.graph import layers_of, module_of
from sdq_export.parity.graphs import identity_row, step_feeds
from sdq_export.passes.name_nodes import NameNodes
from sdq_export.passes.timestep_scales import RATIO_LIMIT, reference_scale
from sdq_export.reference import build_reference
from sdq_export.sampler import SamplerPlan
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser
from tests.export.conftest import GUIDANCE, plan_of
from tests.export.quantized import quantized_checkpoint
from tests.nearness import FLOAT_NOISE, relative
from tests.tiny import prompt_rows

SHAPE = (4, 8, 8)
SAMPLES = 3


def cuts_of(denoiser: Any, plan: SamplerPlan) -> GraphCuts:
    network = network_of(denoiser)
    return network.cuts(network.time_tables(denoiser, torch.from_numpy(plan.timesteps)))


def build(source: Source, captured: ir.Model, plan: SamplerPlan, checkpoint: Any = None) -> DenoiserGraphs:
    tensors = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()} if checkpoint else None
    return build_denoiser(
        captured,
        cuts_of(source.denoiser, plan),
        plan,
        SHAPE,
        spec=checkpoint.spec if checkpoint else None,
        tensors=tensors,
    )


class Graphs:
    """Both graphs, checked, saved, opened; inputs drawn once."""

    def __init__(self, graphs: DenoiserGraphs, plan: SamplerPlan, folder: Path) -> None:
        self.plan = plan
        paths = {name: save_graph(getattr(graphs, name), folder / name) for name in ("denoiser", "prologue")}
        for path in paths.values():
            onnx.checker.check_model(str(path), full_check=True)
        self.denoiser, self.prologue = (open_session(paths[name], threads=1) for name in ("denoiser", "prologue"))
        generator = torch.Generator().manual_seed(5)
        self.conditioning = prompt_rows(torch.randn(2 * SAMPLES, 16, 32, generator=generator))
        self.latents = torch.randn(SAMPLES, *SHAPE, generator=generator)
        names = [output.name for output in self.prologue.get_outputs()]
        self.prompt = dict(zip(names, self.prologue.run(names, self.conditioning.numpy()), strict=True))

    def run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        result: list[NDArray[np.float32]] = self.denoiser.run(None, {**feeds, **self.prompt})
        return result

    def output(self, step: int) -> Tensor:
        feeds = step_feeds(self.plan, self.latents.numpy(), step, GUIDANCE, identity_row(self.plan.slots))
        return torch.from_numpy(self.run(feeds)[0])

    def torch_output(self, denoiser: StepDenoiser, step: int) -> Tensor:
        with torch.no_grad():
            both = denoiser(torch.cat([self.latents] * 2), torch.tensor(step), self.conditioning)
        uncond, cond = both.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler-ancestral"])
def test_the_float_graph_is_torchs_step_denoiser(source: Source, captured: ir.Model, tmp_path: Path, name: str) -> None:
    plan = plan_of(source, name)
    graphs = Graphs(build(source, captured, plan), plan, tmp_path)
    teacher = StepDenoiser(copy.deepcopy(source.denoiser), torch.from_numpy(plan.timesteps))
    for step in range(plan.calls):
        # weights are stored in FP16 only where that loses nothing, and random FP32 weights would lose
        assert relative(graphs.output(step), graphs.torch_output(teacher, step)) < 1e-5


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmpp-2m", "euler-ancestral"])
def test_the_whole_step_is_the_compiled_sampler(source: Source, captured: ir.Model, tmp_path: Path, name: str) -> None:
    plan = plan_of(source, name)
    graphs = Graphs(build(source, captured, plan), plan, tmp_path)
    generator = np.random.default_rng(1)
    for start, step in ((0, 0), (0, 3), (2, 2), (2, plan.calls - 1)):
        state = generator.standard_normal((plan.slots, SAMPLES, *SHAPE)).astype(np.float32)
        noise = generator.standard_normal((SAMPLES, *SHAPE)).astype(np.float32)
        mapped = plan.step_map(start, step)
        graphs.latents = torch.from_numpy(np.tensordot(mapped.u, state, axes=1))
        guided = graphs.output(step).numpy()
        add = np.multiply.outer(mapped.output, guided) + np.multiply.outer(mapped.noise, noise)
        wanted = np.tensordot(mapped.matrix, state, axes=1) + add
        row, history = plan.coefficients[start, step], np.ascontiguousarray(np.moveaxis(state[1:], 0, 1))
        found = graphs.run(step_feeds(plan, state[0], step, GUIDANCE, row, history, noise))
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
        assert len(found) == 1 + (plan.history > 0)
        if plan.history:
            np.testing.assert_allclose(np.moveaxis(found[1], 1, 0), wanted[1:], rtol=1e-4, atol=1e-4)


def test_inputs_and_outputs_are_the_contracts(source: Source, captured: ir.Model) -> None:
    graphs = build(source, captured, plan_of(source, "dpmpp-2m"))
    keys = [value.name for value in graphs.prologue.graph.outputs]
    inputs = {value.name: [str(dim) for dim in value.shape or []] for value in graphs.denoiser.graph.inputs}
    assert list(inputs) == ["latents", "history", "guidance_scale", "step", "coefficients", *keys]
    assert inputs["latents"] == ["batch", "4", "8", "8"]
    assert inputs["history"] == ["batch", "1", "4", "8", "8"]
    assert inputs["coefficients"] == [str(2 * 2 + 3 * 2)]
    assert inputs[keys[0]] == ["2*batch", "16", "32"]
    assert [value.name for value in graphs.denoiser.graph.outputs] == ["latents_out", "history_out"]
    assert keys[:2] == [f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.{part}" for part in ("key", "value")]
    assert len(keys) == 2 * 7


def test_no_time_layer_and_no_text_projection_is_left(source: Source, captured: ir.Model) -> None:
    NameNodes()(captured)
    before = set(layers_of(captured))
    run_passes(captured, cuts_of(source.denoiser, plan_of(source, "ddim")).denoiser)
    gone = before - set(layers_of(captured))
    assert gone == {layer for layer in before if "time_emb" in layer or layer.endswith(("attn2.to_k", "attn2.to_v"))}
    assert not any("time_" in (module_of(node) or "") for node in captured.graph)
    assert not {"Sin", "Cos", "Gemm"} & {node.op_type for node in captured.graph}
    assert not {"timestep", TEXT_INPUT} & {value.name for value in captured.graph.inputs}


@pytest.mark.parametrize(("precision", "groups"), [("w8a8", None), ("w4a8", None), ("w8a8", 1), ("w4a16", 3)])
def test_the_quantized_graph_keeps_the_references_distance(
    source: Source, captured: ir.Model, tmp_path: Path, precision: Any, groups: int | None
) -> None:
    plan = plan_of(source, "ddim")
    checkpoint = quantized_checkpoint(source, plan, precision, groups)
    graphs = Graphs(build(source, captured, plan, checkpoint), plan, tmp_path)
    timesteps = torch.from_numpy(plan.timesteps)
    reference = build_reference(source.own(source.family.denoiser), checkpoint.spec, checkpoint.tensors, timesteps)
    teacher = StepDenoiser(copy.deepcopy(source.denoiser), timesteps)
    found, wanted = [], []
    for step in range(plan.calls):
        truth = graphs.torch_output(teacher, step)
        found.append(relative(graphs.output(step), truth))
        wanted.append(relative(graphs.torch_output(reference, step), truth))
    assert min(wanted) > 1e-3
    np.testing.assert_allclose(np.mean(found), np.mean(wanted), rtol=0.05)


def test_every_scale_is_a_constant_and_section_5s_form(source: Source, captured: ir.Model) -> None:
    plan = plan_of(source, "ddim")
    checkpoint = quantized_checkpoint(source, plan, "w4a8")
    denoiser = build(source, captured, plan, checkpoint).denoiser
    quantizers = [node for node in denoiser.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(node.inputs[1] is not None and node.inputs[1].is_initializer() for node in quantizers)
    sites = checkpoint.spec.activations
    assert sum(node.op_type == "QuantizeLinear" for node in quantizers) == len(sites)
    site = sites[0]
    per_step = checkpoint.tensors[scale_key(site.name)].numpy()[list(site.groups)]
    first = site.consumers[0]
    tables = denoiser.graph.initializers
    scale = float(array_of(tables[f"{first}.input_scale"]))  # type: ignore[arg-type]
    assert scale == pytest.approx(np.exp(np.log(per_step).mean()), rel=1e-5)
    np.testing.assert_allclose(array_of(tables[f"{first}.in_ratio"]), scale / per_step, rtol=1e-6)
    np.testing.assert_allclose(array_of(tables[f"{first}.out_ratio"]), per_step / scale, rtol=1e-6)


def test_shared_sites_have_one_quantizer(source: Source, captured: ir.Model) -> None:
    plan = plan_of(source, "ddim")
    denoiser = build(source, captured, plan, quantized_checkpoint(source, plan, "w8a8")).denoiser
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    inputs = {
        layer.node.inputs[0] for layer in quantized_layers(denoiser) if layer.name.startswith(f"{attention}.to_q")
    }
    inputs |= {layer.node.inputs[0] for layer in quantized_layers(denoiser) if layer.name == f"{attention}.to_v"}
    assert len(inputs) == 1


def test_four_bit_weights_are_packed(source: Source, captured: ir.Model, tmp_path: Path) -> None:
    plan = plan_of(source, "ddim")
    denoiser = build(source, captured, plan, quantized_checkpoint(source, plan, "w4a16", block_size=16)).denoiser
    types = {layer.name: (layer.precision, layer.weight_dequantize) for layer in quantized_layers(denoiser)}
    for name, (precision, dequantize) in types.items():
        assert dequantize is not None
        integers = dequantize.inputs[0]
        assert integers is not None
        convolution = "conv" in name.rsplit(".", 1)[-1] or name.endswith(("proj_in", "proj_out"))
        assert precision == ("w8a8" if convolution else "w4a16")
        assert integers.dtype == (ir.DataType.INT8 if convolution else ir.DataType.INT4)
        assert ("block_size" in dequantize.attributes) == (not convolution)
    stored = onnx.load(save_graph(denoiser, tmp_path)).graph.initializer
    packed = [tensor for tensor in stored if tensor.data_type == onnx.TensorProto.INT4]
    assert packed
    for tensor in packed:
        assert len(tensor.raw_data) == (np.prod(tensor.dims) + 1) // 2


def test_single_group_leaves_the_bias_in_the_convolution(source: Source, captured: ir.Model) -> None:
    plan = plan_of(source, "ddim")
    denoiser = build(source, captured, plan, quantized_checkpoint(source, plan, "w8a8", 1)).denoiser
    assert not any("ratio" in (node.name or "") for node in denoiser.graph)
    biased = {layer.name for layer in quantized_layers(denoiser) if len(layer.node.inputs) == 3}
    assert "down_blocks.0.resnets.0.conv2" in biased
    # the time row has conv1's bias in it
    assert "down_blocks.0.resnets.0.conv1" not in biased


def test_names_are_the_layers(source: Source, captured: ir.Model) -> None:
    plan = plan_of(source, "ddim")
    denoiser = build(source, captured, plan, quantized_checkpoint(source, plan, "w4a8")).denoiser
    names = {node.name for node in denoiser.graph}
    layer = "down_blocks.0.resnets.0.conv2"
    for part in ("rescale_in", "quantize", "dequantize", "weight_dequantize", "rescale_out", "add_bias", "Conv"):
        assert f"{layer}/{part}" in names
    metadata = {key for node in denoiser.graph for key in node.metadata_props}
    assert metadata == {"sdq.layer", "sdq.precision"}


def test_scales_that_fp16_cannot_follow_are_refused_by_name(source: Source, captured: ir.Model) -> None:
    plan = plan_of(source, "ddim")
    checkpoint = quantized_checkpoint(source, plan, "w8a8")
    site = checkpoint.spec.activations[3]
    checkpoint.tensors[scale_key(site.name)][0] *= RATIO_LIMIT * 50
    with pytest.raises(SdqError, match="span a factor") as refused:
        build(source, captured, plan, checkpoint)
    assert site.name in refused.value.message


def test_the_reference_scale_stays_a_normal_fp16_number() -> None:
    assert reference_scale(np.array([0.01, 0.04], np.float32)) == pytest.approx(0.02)
    assert reference_scale(np.array([1e-7, 1e-7], np.float32)) == 2.0**-13


def test_an_unknown_time_path_is_one_sentence(source: Source, captured: ir.Model) -> None:
    cuts = cuts_of(source.denoiser, plan_of(source, "ddim"))
    NameNodes()(captured)
    addition = next(node for node in captured.graph if node.name == "down_blocks.0.resnets.0/Add")
    addition.replace_input_with(1, captured.graph.initializers["down_blocks.0.resnets.0.conv1.bias"])
    with pytest.raises(SdqError, match="does not support"):
        run_passes(captured, cuts.denoiser)


def test_fp16_storage_changes_no_number(source: Source, captured: ir.Model, tmp_path: Path) -> None:
    plan = plan_of(source, "ddim")
    halves = {name: tensor.half().float().numpy() for name, tensor in source.denoiser.state_dict().items()}
    outputs, sizes = [], []
    for stored in (False, True):
        graphs = build_denoiser(
            captured.clone(), cuts_of(source.denoiser, plan), plan, SHAPE, weights=halves, store_fp16=stored
        )
        runner = Graphs(graphs, plan, tmp_path / str(stored))
        outputs.append(runner.output(2))
        sizes.append((tmp_path / str(stored) / "denoiser" / "model.onnx").stat().st_size)
    assert relative(*outputs) <= FLOAT_NOISE
    assert sizes[1] < 0.75 * sizes[0]


def test_stable_diffusion_2s_forms(tmp_path: Path) -> None:
    """Linear projections in and out, heads by level, upcast attention, v-prediction, no attention in one level."""
    from diffusers import UNet2DConditionModel

    from sdq_export.sampler import compile_sampler, make_scheduler

    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}
    plan = compile_sampler(make_scheduler(None, config), 4)
    captured = network_of(unet).capture(unet, SHAPE, 16)
    graphs = Graphs(build_denoiser(captured, cuts_of(unet, plan), plan, SHAPE), plan, tmp_path)
    teacher = StepDenoiser(copy.deepcopy(unet), torch.from_numpy(plan.timesteps))
    for step in range(plan.calls):
        assert relative(graphs.output(step), graphs.torch_output(teacher, step)) < 1e-5
