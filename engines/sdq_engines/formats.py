"""Number formats and precisions: plain data that training, export and engines ask.

A *number format* says which numbers a quantized tensor may hold: code * scale, code one of the format's, and how many
elements share a scale. A layer has one for its weight and one for its input, or none. A *precision* is a name for the
formats of all layers; `PRECISIONS` is the one list of them. What rounds by a format is in the rooms above
(`sdq_export.rounding`). docs/architecture.md says how a format is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

__all__ = [
    "FP8",
    "INT4",
    "INT8",
    "LAYER_FORMATS",
    "PRECISIONS",
    "Granularity",
    "LayerFormats",
    "NumberFormat",
    "Operator",
    "Precision",
    "PrecisionName",
    "formats_of",
    "number_format",
]

Granularity = Literal["tensor", "channel", "block"]
Operator = Literal["conv", "linear"]

#: Every precision of a quantized denoiser, in the order in which they are offered.
PrecisionName = Literal["w8a8", "w4a8", "w4a16", "fp8"]


@dataclass(frozen=True)
class NumberFormat:
    """Which numbers a tensor may hold, symmetric around zero and without zero points.

    Attributes:
        element: its short name, e.g. "int8".
        title: its name in messages.
        kind: integers round half to even on an even grid; floats round half to even in their last bit.
        bits: of one code.
        low, high: the least and the greatest code; what is beyond is clipped.
        stored: type in which a quantized checkpoint keeps the codes, a name of torch and numpy (or ml_dtypes).
        onnx_type: type of the codes in a package's graphs, a name of onnx.TensorProto.
        array_type: the same as numpy (or ml_dtypes) calls it.
        multiplied_as: the element in which engines multiply it by a quantized input: its own, or a wider one that
            holds all of its codes.
        least_sm: the oldest NVIDIA architecture that multiplies it; 75 is the oldest that is supported at all.
        refused_by: engine -> why it cannot compute with it, as the end of a sentence.
        granularity: what shares a scale: the tensor, an output channel, or `block_size` inputs of one.
        block_size: elements along a Linear's input; None unless the granularity is "block".
    """

    element: str
    title: str
    kind: Literal["integer", "float"]
    bits: int
    low: float
    high: float
    stored: str
    onnx_type: str
    array_type: str
    multiplied_as: str
    least_sm: int = 75
    refused_by: Mapping[str, str] = field(default_factory=dict, hash=False)
    granularity: Granularity = "channel"
    block_size: int | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "block") != (self.block_size is not None):
            raise ValueError(f"{self.element} by {self.granularity} with block_size {self.block_size}")

    @property
    def name(self) -> str:
        """What `number_format` reads: "int8/channel", "int8/tensor", "int4/block64"."""
        return f"{self.element}/{self.granularity}{self.block_size or ''}"

    @property
    def is_packed(self) -> bool:
        """Whether a package holds it in a narrower type than the checkpoint."""
        return self.stored != self.array_type

    def per_tensor(self) -> NumberFormat:
        """The same codes, one scale for the tensor (and step)."""
        return replace(self, granularity="tensor", block_size=None)

    def per_channel(self) -> NumberFormat:
        """The same codes, one scale for each output channel."""
        return replace(self, granularity="channel", block_size=None)

    def in_blocks(self, size: int) -> NumberFormat:
        """The same codes, one scale for each block of `size` inputs of an output channel."""
        return replace(self, granularity="block", block_size=size)


def _integer(bits: int, stored: str, multiplied_as: str) -> NumberFormat:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    name, title = f"int{bits}", f"INT{bits}"
    return NumberFormat(name, title, "integer", bits, low, high, stored, title, name, multiplied_as)


INT8 = _integer(8, stored="int8", multiplied_as="int8")

#: No engine multiplies INT4 by INT8; every code of INT4 is one of INT8.
INT4 = _integer(4, stored="int8", multiplied_as="int8")

#: FP8 E4M3 without infinities (Micikevicius et al., "FP8 Formats for Deep Learning", 2022; ONNX "Float stored in 8
#: bits"): 4 bits of exponent, 3 of mantissa, up to 448, the smallest number 2^-9.
FP8 = NumberFormat(
    element="fp8",
    title="FP8 E4M3",
    kind="float",
    bits=8,
    low=-448.0,
    high=448.0,
    stored="float8_e4m3fn",
    onnx_type="FLOAT8E4M3FN",
    array_type="float8_e4m3fn",
    multiplied_as="fp8",
    least_sm=89,
    refused_by={"openvino": "it compiles FP8 without a word, and its results are off by 5 %"},
)

_ELEMENTS = {each.element: each for each in (INT8, INT4, FP8)}


def number_format(name: str) -> NumberFormat:
    """The format of a name such as "int8/channel" or "int4/block64".

    Raises:
        ValueError: there is none of this name; the message lists what there is.
    """
    element, _, shared = name.partition("/")
    found = _ELEMENTS.get(element)
    if found is not None and shared in ("tensor", "channel"):
        return found.per_tensor() if shared == "tensor" else found
    size = shared.removeprefix("block")
    if found is not None and size != shared and size.isdecimal() and int(size) >= 16:
        return found.in_blocks(int(size))
    known = ", ".join(_ELEMENTS)
    raise ValueError(f"{name!r} is no number format: one of {known}, then /tensor, /channel or /block<16 or more>")


@dataclass(frozen=True)
class LayerFormats:
    """What one layer's operands are quantized to.

    Attributes:
        name: what the graph's metadata `sdq.precision` says.
        weight: of its weight.
        activation: of its input; None leaves that in floating point.
    """

    name: str
    weight: NumberFormat
    activation: NumberFormat | None

    @property
    def elements(self) -> tuple[str, str | None]:
        """The names of the two operands' elements."""
        return self.weight.element, self.activation.element if self.activation is not None else None

    def with_weight_bits(self, bits: int) -> LayerFormats | None:
        """The same for the input, with a weight of `bits` bits; None where there is no such layer."""
        fitting = (each for each in LAYER_FORMATS.values() if each.elements[1] == self.elements[1])
        return next((each for each in fitting if each.weight.bits == bits), None)


_W8A8 = LayerFormats("w8a8", INT8, INT8.per_tensor())
_W4A8 = LayerFormats("w4a8", INT4, INT8.per_tensor())
_W4A16 = LayerFormats("w4a16", INT4.in_blocks(64), None)
_W8A16 = LayerFormats("w8a16", INT8, None)
_FP8 = LayerFormats("fp8", FP8, FP8.per_tensor())

#: Every combination that a layer may have, by its name.
LAYER_FORMATS = {each.name: each for each in (_W8A8, _W4A8, _W4A16, _W8A16, _FP8)}


def formats_of(weight: NumberFormat, activation: NumberFormat | None) -> LayerFormats:
    """The combination of a layer with these formats, whatever shares their scales.

    Raises:
        ValueError: no layer has these two.
    """
    elements = weight.element, activation.element if activation is not None else None
    for each in LAYER_FORMATS.values():
        if each.elements == elements:
            return each
    raise ValueError(f"no layer has a weight of {elements[0]} and an input of {elements[1] or 'floating point'}")


@dataclass(frozen=True)
class Precision:
    """A named preset: the formats of convolutions and of linear layers."""

    name: PrecisionName
    conv: LayerFormats
    linear: LayerFormats

    def of(self, operator: Operator) -> LayerFormats:
        """The formats of a layer of this kind."""
        return self.conv if operator == "conv" else self.linear

    @property
    def weights_alone(self) -> bool:
        """Whether the inputs of Linear layers stay in floating point."""
        return self.linear.activation is None

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """Every format that it uses."""
        pairs = ((each.weight, each.activation) for each in (self.conv, self.linear))
        return tuple(dict.fromkeys(each for pair in pairs for each in pair if each is not None))


_PRESETS: Mapping[PrecisionName, tuple[LayerFormats, LayerFormats]] = {
    "w8a8": (_W8A8, _W8A8),
    "w4a8": (_W4A8, _W4A8),
    "w4a16": (_W8A8, _W4A16),
    "fp8": (_FP8, _FP8),
}

PRECISIONS: Mapping[str, Precision] = {name: Precision(name, *_PRESETS[name]) for name in get_args(PrecisionName)}
