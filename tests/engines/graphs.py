"""Small real graphs in the package's canonical form (docs/package-format.md), drawn by hand with a fixed seed.

The denoiser has every quantized form that a lowering must handle: a convolution with a per-step scale and a time row,
a convolution with one scale, three Linear layers that share one quantized input, an INT4 Linear, and the sampler step
around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdq_engines.package.layout import DENOISER, PROLOGUE, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER

#: The components that every package has, in the order in which a prompt passes through them.
COMPONENTS = (TEXT_ENCODER, PROLOGUE, DENOISER, VAE_DECODER)

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
KEY, VALUE = f"{ATTENTION}.attn2.key", f"{ATTENTION}.attn2.value"


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the hand-made model."""

    precision: str = "w8a8"
    steps: int = 4
    history: int = 1
    stochastic: bool = False
    channels: int = 32
    latent: int = 8
    tokens: int = 12
    vocabulary: int = 40
    text_width: int = 16
    groups: int = 4
    block: int = 16
    seed: int = 0
    encoder: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        return (*COMPONENTS, VAE_ENCODER) if self.encoder else COMPONENTS

    @property
    def slots(self) -> int:
        return 1 + self.history

    @property
    def row(self) -> int:
        return self.slots * self.slots + 3 * self.slots


class Graph:
    """Collects nodes and initializers under readable names."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def const(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(
        self, op: str, inputs: list[str], name: str, outputs: list[str] | None = None, **attributes: object
    ) -> str:
        made = helper.make_node(op, inputs, outputs or [name], name=name, **attributes)
        self.nodes.append(made)
        return made.output[0]

    def weight(self, name: str, *shape: int) -> str:
        """A float weight in the package's storage form: FP16 behind a Cast to FP32."""
        scale = 1.0 / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0])
        stored = self.const(f"{name}.fp16", (self.random.standard_normal(shape) * scale).astype(np.float16))
        return self.node("Cast", [stored], name, to=FLOAT)

    def model(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


class QuantizedLayers:
    """Draws quantized Linear and Conv layers in the form of docs/quantization.md into a graph."""

    def __init__(self, graph: Graph, shape: TinyShape) -> None:
        self.graph, self.shape = graph, shape

    def bits(self, op: str) -> tuple[int, bool]:
        """(weight bits, whether activations are quantized) of an operator at this precision."""
        if self.shape.precision == "w8a8" or (self.shape.precision == "w4a16" and op == "Conv"):
            return 8, True
        return 4, self.shape.precision == "w4a8"

    def site(self, x: str, layer: str, per_step: bool, amax: float = 3.0) -> tuple[str, str | None]:
        """Quantize `x` as the input of `layer`; returns the value and the name of its per-step output ratio."""
        g, count = self.graph, self.shape.groups if per_step else 1
        scales = (amax / 127 * np.linspace(0.7, 1.4, count)).astype(np.float32)
        reference = np.float32(np.exp(np.log(scales).mean()))
        ratio = None
        if count > 1:
            table = np.repeat(scales, -(-self.shape.steps // count))[: self.shape.steps]
            down = g.const(f"{layer}/in_ratio_table", (reference / table).astype(np.float32))
            up = g.const(f"{layer}/out_ratio_table", (table / reference).astype(np.float32))
            x = g.node("Mul", [x, g.node("Gather", [down, "step"], f"{layer}/in_ratio")], f"{layer}/rescale_in")
            ratio = g.node("Gather", [up, "step"], f"{layer}/out_ratio")
        scale = g.const(f"{layer}/scale", np.asarray(reference))
        zero = g.const(f"{layer}/zero", np.zeros((), np.int8))
        x = g.node("QuantizeLinear", [x, scale, zero], f"{layer}/quantize")
        return g.node("DequantizeLinear", [x, scale, zero], f"{layer}/dequantize"), ratio

    def quantized_weight(self, layer: str, float_weight: np.ndarray, axis: int, bits: int, block: int | None) -> str:
        g, top = self.graph, 2 ** (bits - 1) - 1
        if block:  # blocks along the first axis of a Linear's [in, out]
            grouped = float_weight.reshape(-1, block, float_weight.shape[1])
            scale = np.abs(grouped).max(axis=1) / top
            integers = np.round(grouped / scale[:, None]).reshape(float_weight.shape)
            attributes = {"axis": 0, "block_size": block}
        else:
            scale = np.abs(float_weight).max(axis=tuple(i for i in range(float_weight.ndim) if i != axis)) / top
            broadcast = scale.reshape([-1 if i == axis else 1 for i in range(float_weight.ndim)])
            integers, attributes = np.round(float_weight / broadcast), {"axis": axis}
        integers = np.clip(integers, -top - 1, top).astype(np.int8 if bits == 8 else ml_dtypes.int4)
        names = [g.const(f"{layer}.weight", integers), g.const(f"{layer}.weight_scale", scale.astype(np.float32))]
        return g.node("DequantizeLinear", names, f"{layer}/weight_dequantize", **attributes)

    def layer(
        self, op: str, x: str, layer: str, shape: tuple[int, ...], ratio: str | None, time_row: bool = False
    ) -> str:
        """The operator itself, with weights of `shape`, its output rescale and its bias."""
        g, conv = self.graph, op == "Conv"
        bits, activations = self.bits(op)
        weight = (g.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) if conv else shape[0])).astype(
            np.float32
        )
        block = None if conv or activations or bits == 8 else self.shape.block
        w = self.quantized_weight(layer, weight, 0 if conv else 1, bits, block)
        channels = shape[0] if conv else shape[1]
        bias = (g.random.standard_normal(channels) * 0.1).astype(np.float32)
        inputs = [x, w]
        if conv and ratio is None and not time_row:
            inputs.append(g.const(f"{layer}.bias", bias))
        attributes = {"kernel_shape": list(shape[2:]), "pads": [shape[2] // 2] * 4} if conv else {}
        y = g.node(op, inputs, layer, **attributes)
        properties = {"sdq.layer": layer, "sdq.precision": f"w{bits}a{8 if activations else 16}"}
        for key, text in properties.items():
            g.nodes[-1].metadata_props.add(key=key, value=text)
        if ratio is not None:
            y = g.node("Mul", [y, ratio], f"{layer}/rescale_out")
        if len(inputs) == 3:
            return y
        if time_row:
            rows = bias.reshape(1, channels, 1, 1) + g.random.standard_normal((self.shape.steps, channels, 1, 1)) * 0.1
            table = g.const(f"{layer}/time_rows", rows.astype(np.float32))
            addend = g.node("Gather", [table, "step"], f"{layer}/time_row")
        else:
            addend = g.const(f"{layer}.bias", bias.reshape(channels, 1, 1) if conv else bias)
        return g.node("Add", [y, addend], f"{layer}/add_bias")


def text_encoder(shape: TinyShape) -> onnx.ModelProto:
    """input_ids [batch, L] -> text_embeddings [batch, L, D]."""
    g = Graph(shape.seed + 1)
    table = g.weight("token_embedding", shape.vocabulary, shape.text_width)
    x = g.node("Gather", [table, "input_ids"], "embedded")
    x = g.node("Add", [x, g.weight("position_embedding", shape.tokens, shape.text_width)], "positioned")
    x = g.node("MatMul", [x, g.weight("proj", shape.text_width, shape.text_width)], "projected")
    g.node("Tanh", [x], "text_embeddings")
    ids = value("input_ids", INT64, ["batch", shape.tokens])
    return g.model("text_encoder", [ids], [value("text_embeddings", FLOAT, ["batch", shape.tokens, shape.text_width])])


def prologue(shape: TinyShape) -> onnx.ModelProto:
    """text_embeddings -> key and value of the one cross-attention."""
    g = Graph(shape.seed + 2)
    for name in (KEY, VALUE):
        g.node("MatMul", ["text_embeddings", g.weight(f"{name}.weight", shape.text_width, shape.channels)], name)
    inner: list[int | str] = ["batch", shape.tokens, shape.channels]
    inputs = [value("text_embeddings", FLOAT, ["batch", shape.tokens, shape.text_width])]
    return g.model("prologue", inputs, [value(name, FLOAT, inner) for name in (KEY, VALUE)])


def vae_decoder(shape: TinyShape) -> onnx.ModelProto:
    """latents -> images in [0, 1], eight times as large."""
    g = Graph(shape.seed + 3)
    x = g.node(
        "Conv", ["latents", g.weight("conv_in.weight", 8, 4, 3, 3)], "conv_in", kernel_shape=[3, 3], pads=[1] * 4
    )
    scales = g.const("scales", np.array([1, 1, 8, 8], np.float32))
    x = g.node("Resize", [g.node("Tanh", [x], "act"), "", scales], "up", mode="nearest")
    x = g.node("Conv", [x, g.weight("conv_out.weight", 3, 8, 3, 3)], "conv_out", kernel_shape=[3, 3], pads=[1] * 4)
    half = g.const("half", np.float32(0.5))
    x = g.node("Add", [g.node("Mul", [x, half], "halved"), half], "shifted")
    g.node("Clip", [x, g.const("low", np.float32(0)), g.const("high", np.float32(1))], "images")
    size = 8 * shape.latent
    latents = value("latents", FLOAT, ["batch", 4, shape.latent, shape.latent])
    return g.model("vae_decoder", [latents], [value("images", FLOAT, ["batch", 3, size, size])])


def vae_encoder(shape: TinyShape) -> onnx.ModelProto:
    """images in [-1, 1] -> means, then standard deviations, of latents an eighth as large."""
    g = Graph(shape.seed + 4)
    patches = {"kernel_shape": [8, 8], "strides": [8, 8]}
    mean = g.node("Conv", ["images", g.weight("mean.weight", 4, 3, 8, 8)], "mean", **patches)
    spread = g.node("Conv", ["images", g.weight("std.weight", 4, 3, 8, 8)], "spread", **patches)
    g.node("Concat", [mean, g.node("Sigmoid", [spread], "std")], "latent_moments", axis=1)
    size = 8 * shape.latent
    images = value("images", FLOAT, ["batch", 3, size, size])
    return g.model("vae_encoder", [images], [value("latent_moments", FLOAT, ["batch", 8, shape.latent, shape.latent])])


def _attention(g: Graph, name: str, q: str, k: str, v: str, width: int) -> str:
    scaled = g.node("Mul", [q, g.const(f"{name}/root", np.float32(width**-0.5))], f"{name}/scaled")
    scores = g.node("MatMul", [scaled, g.node("Transpose", [k], f"{name}/kt", perm=[0, 2, 1])], f"{name}/scores")
    return g.node("MatMul", [g.node("Softmax", [scores], f"{name}/softmax", axis=-1), v], f"{name}/mixed")


def _unet(g: Graph, shape: TinyShape, x: str) -> str:
    """The denoiser proper: convolutions, self- and cross-attention, both convolutions at its ends in FP."""
    c, pixels = shape.channels, shape.latent**2
    layers = QuantizedLayers(g, shape)
    x = g.node("Conv", [x, g.weight("conv_in.weight", c, 4, 3, 3)], "conv_in", kernel_shape=[3, 3], pads=[1] * 4)
    norm = [g.const("norm.weight", 1 + 0.1 * g.random.standard_normal(c).astype(np.float32))]
    norm.append(g.const("norm.bias", 0.1 * g.random.standard_normal(c).astype(np.float32)))
    h = g.node("GroupNormalization", [x, *norm], "mid_block.resnets.0.norm1", num_groups=8, epsilon=1e-5)
    h = g.node("Mul", [h, g.node("Sigmoid", [h], "silu/sigmoid")], "silu")
    conv1, conv2 = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"
    ratio = None
    if layers.bits("Conv")[1]:
        h, ratio = layers.site(h, conv1, per_step=shape.groups > 1)
    h = layers.layer("Conv", h, conv1, (c, c, 3, 3), ratio, time_row=True)
    if layers.bits("Conv")[1]:
        h, _ = layers.site(h, conv2, per_step=False)
    h = layers.layer("Conv", h, conv2, (c, c, 3, 3), None)
    x = g.node("Add", [x, h], "mid_block.resnets.0/add")
    rows = g.node("Reshape", [x, g.const("rows_shape", np.array([0, c, pixels]))], "rows_nchw")
    rows = g.node("Transpose", [rows], "rows", perm=[0, 2, 1])
    projections = {}
    shared, ratio = rows, None
    if layers.bits("MatMul")[1]:
        shared, ratio = layers.site(rows, f"{ATTENTION}.attn1.to_q", per_step=shape.groups > 1)
    for kind in "qkv":
        projections[kind] = layers.layer("MatMul", shared, f"{ATTENTION}.attn1.to_{kind}", (c, c), ratio)
    mixed = _attention(g, f"{ATTENTION}.attn1", *(projections[k] for k in "qkv"), c)
    rows = g.node("Add", [rows, mixed], f"{ATTENTION}.attn1/residual")
    q_name, ratio = f"{ATTENTION}.attn2.to_q", None
    q = rows
    if layers.bits("MatMul")[1]:
        q, ratio = layers.site(rows, q_name, per_step=False)
    q = layers.layer("MatMul", q, q_name, (c, c), ratio)
    rows = g.node("Add", [rows, _attention(g, f"{ATTENTION}.attn2", q, KEY, VALUE, c)], f"{ATTENTION}.attn2/residual")
    x = g.node("Transpose", [rows], "rows_back", perm=[0, 2, 1])
    x = g.node("Reshape", [x, g.const("image_shape", np.array([0, c, shape.latent, shape.latent]))], "image")
    x = g.node("Tanh", [x], "conv_act")
    return g.node("Conv", [x, g.weight("conv_out.weight", 4, c, 3, 3)], "conv_out", kernel_shape=[3, 3], pads=[1] * 4)


def _coefficients(g: Graph, shape: TinyShape) -> dict[str, str]:
    """Cut the coefficient row into M [S, S], N [S], Cn [S] and u [S], shaped to broadcast over [batch, S, C, h, w]."""
    s = shape.slots
    ends = {"M": (0, s * s), "N": (s * s, s), "Cn": (s * s + s, s), "u": (s * s + 2 * s, s)}
    shapes = {"M": [s, s], "N": [1, s, 1, 1, 1], "Cn": [1, s, 1, 1, 1], "u": [1, s, 1, 1, 1]}
    cut = {}
    for name, (start, length) in ends.items():
        bounds = [g.const(f"sampler/{name}_{i}", np.array([v])) for i, v in enumerate((start, start + length))]
        part = g.node("Slice", ["coefficients", *bounds], f"sampler/{name}_flat")
        target = g.const(f"sampler/{name}_shape", np.array(shapes[name]))
        cut[name] = g.node("Reshape", [part, target], f"sampler/{name}")
    return cut


def denoiser(shape: TinyShape) -> onnx.ModelProto:
    """The whole step: state and prompt in, new state out."""
    g = Graph(shape.seed)
    cut = _coefficients(g, shape)
    s, size = shape.slots, shape.latent
    one = g.const("sampler/one", np.array([1]))
    state = g.node("Unsqueeze", ["latents", one], "sampler/latents_slot")
    if shape.history:
        state = g.node("Concat", [state, "history"], "sampler/state", axis=1)
    weighted = g.node("Mul", [state, cut["u"]], "sampler/weighted_state")
    model_input = g.node("ReduceSum", [weighted, one], "sampler/model_input", keepdims=0)
    both = g.node("Concat", [model_input, model_input], "sampler/model_input_twice", axis=0)
    output = _unet(g, shape, both)
    g.node("Split", [output], "sampler/split", outputs=["sampler/uncond", "sampler/cond"], axis=0, num_outputs=2)
    difference = g.node("Sub", ["sampler/cond", "sampler/uncond"], "sampler/difference")
    scaled = g.node("Mul", [difference, "guidance_scale"], "sampler/scaled_difference")
    guided = g.node("Add", ["sampler/uncond", scaled], "sampler/guided")
    flat = g.node("Reshape", [state, g.const("sampler/flat", np.array([0, s, 4 * size * size]))], "sampler/state_flat")
    moved = g.node("MatMul", [cut["M"], flat], "sampler/moved_flat")
    moved = g.node("Reshape", [moved, g.const("sampler/unflat", np.array([0, s, 4, size, size]))], "sampler/moved")
    guided_slot = g.node("Unsqueeze", [guided, one], "sampler/guided_slot")
    new = g.node("Add", [moved, g.node("Mul", [guided_slot, cut["N"]], "sampler/driven")], "sampler/new_state")
    if shape.stochastic:
        noise = g.node("Mul", [g.node("Unsqueeze", ["noise", one], "sampler/noise_slot"), cut["Cn"]], "sampler/noisy")
        new = g.node("Add", [new, noise], "sampler/new_noisy_state")
    if shape.history:
        sizes = g.const("sampler/sizes", np.array([1, shape.history]))
        g.node("Split", [new, sizes], "sampler/out", outputs=["sampler/latents_slot_out", "history_out"], axis=1)
        new = "sampler/latents_slot_out"
    g.node("Squeeze", [new, one], "latents_out")
    return g.model("denoiser", *_denoiser_io(shape))


def _denoiser_io(shape: TinyShape) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    latents: list[int | str] = ["batch", 4, shape.latent, shape.latent]
    history: list[int | str] = ["batch", shape.history, 4, shape.latent, shape.latent]
    inputs = [value("latents", FLOAT, latents)]
    outputs = [value("latents_out", FLOAT, latents)]
    if shape.history:
        inputs.append(value("history", FLOAT, history))
        outputs.append(value("history_out", FLOAT, history))
    if shape.stochastic:
        inputs.append(value("noise", FLOAT, latents))
    inputs += [value("guidance_scale", FLOAT, []), value("step", INT64, []), value("coefficients", FLOAT, [shape.row])]
    inputs += [value(name, FLOAT, ["2*batch", shape.tokens, shape.channels]) for name in (KEY, VALUE)]
    return inputs, outputs


def component(name: str, shape: TinyShape) -> onnx.ModelProto:
    """The component's canonical graph by its name in the package."""
    makers = {
        "text_encoder": text_encoder,
        "prologue": prologue,
        "denoiser": denoiser,
        "vae_decoder": vae_decoder,
        "vae_encoder": vae_encoder,
    }
    return makers[name](shape)
