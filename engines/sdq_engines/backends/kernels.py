"""Which quantized layers really run on kernels of their formats, read from what an engine compiled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdq_engines.lowering.graph import load_graph, quantized_layers
from sdq_engines.package.layout import DENOISER
from sdq_engines.package.schema import KernelCounts

if TYPE_CHECKING:
    from sdq_engines.package.store import Package

__all__ = ["CompiledLayer", "count", "layer_names", "onnxruntime_counts", "openvino_layers", "tensorrt_layers"]

#: Element of a number format -> what engines call it.
_TYPES = {
    "int8": frozenset({"int8", "int8_t", "uint8", "uint8_t", "i8", "u8"}),
    "int4": frozenset({"int4", "int4_t", "uint4", "i4", "u4"}),
    "fp8": frozenset({"fp8", "f8e4m3"}),
}


@dataclass(frozen=True)
class CompiledLayer:
    """One kernel: the ONNX nodes it came from, and the types of its data and of its constants."""

    sources: frozenset[str]
    inputs: tuple[str, ...]
    constants: tuple[str, ...]

    def multiplies(self, element: str) -> bool:
        """It multiplies two numbers of this element: one operand is data, the other a constant or data too."""
        types, names = (*self.inputs, *self.constants), _TYPES[element]
        return any(t in names for t in self.inputs) and sum(t in names for t in types) >= 2

    def reads(self, element: str) -> bool:
        """It reads numbers of this element itself."""
        return any(t in _TYPES[element] for t in (*self.inputs, *self.constants))

    @property
    def kind(self) -> str | None:
        """The field of `KernelCounts` that it counts for; None for one in floating point."""
        for element in ("int8", "fp8"):
            if self.multiplies(element):
                return element
        return "int4" if self.reads("int4") else None


def layer_names(package: Package) -> dict[str, set[str]]:
    """Quantized layer -> the names under which an engine may report it: its own, its node's and its node's outputs."""
    model = load_graph(package.component(DENOISER))
    names: dict[str, set[str]] = {}
    for layer in quantized_layers(model):
        outputs = {value.name for value in layer.node.outputs if value.name}
        names[layer.name] = {layer.name, *outputs} | ({layer.node.name} if layer.node.name else set())
    return names


def count(package: Package, layers: Iterable[CompiledLayer]) -> KernelCounts | None:
    """Sort the package's quantized layers by the kernels found; None for a package without quantized layers."""
    names = layer_names(package)
    if not names:
        return None
    found: dict[str, set[str]] = {"int8": set(), "fp8": set(), "int4": set()}
    for kernel in layers:
        if kernel.kind is not None:
            found[kernel.kind] |= {name for name, aliases in names.items() if aliases & kernel.sources}
    multiplied = found["int8"] | found["fp8"]
    return KernelCounts(
        quantized_layers=len(names),
        int8=len(found["int8"]),
        fp8=len(found["fp8"]),
        int4=len(found["int4"] - multiplied),
        fallback=sorted(name for name in names if name not in multiplied | found["int4"]),
    )


def onnxruntime_counts(package: Package) -> KernelCounts | None:
    """ONNX Runtime with Q/DQ fusion off computes quantized values in FP32: every quantized layer has fallen back."""
    return count(package, [])


def openvino_layers(compiled: Any) -> Iterable[CompiledLayer]:
    """The matrix kernels of an OpenVINO CPU model, from its runtime graph.

    A kernel names the ONNX nodes fused into it (`originalLayersNames`); names that a transformation made start with
    the node's, e.g. "<layer>/DequantizationMultiply" or "<layer>/WithoutBiases".
    """
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if _text(info, "layerType") not in ("Convolution", "FullyConnected", "MatMul"):
            continue
        named = {node.get_friendly_name(), *_text(info, "originalLayersNames").split(",")}
        sources = frozenset(named | {name.split("/")[0] for name in named})
        # The first two inputs are the operands; biases and scales follow.
        types = [str(port.get_element_type()).lower() for port in node.inputs()[:2]]
        yield CompiledLayer(sources, tuple(re.sub(r".*'(.*)'.*", r"\1", text) for text in types), ())


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


#: One line of TensorRT's verbose layer list at detailed profiling verbosity.
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[.*?Metadata: (?P<metadata>.*)$"
)
_TYPE = re.compile(
    r"Datatype: (?:[^,}]*?)\b(Int8|Int4|UInt8|Half|Float|BFloat16|FP8|Int32|Int64|Bool|INT8|INT4|FP16|FP32)\b"
)
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
#: Kernels that move or rescale data; an INT8 or FP8 type there says nothing about the multiplication.
_NOT_MATRIX = frozenset({"kgen", "shape_call", "Reformat", "NoOp", "Constant"})


def tensorrt_layers(log: str) -> Iterable[CompiledLayer]:
    """The matrix kernels in a TensorRT or TensorRT-RTX builder's verbose layer list.

    The list prints, for each kernel, the types of inputs and constants and the ONNX nodes that it came from, which is
    what tells a fused INT8 convolution (`Int8` data, `Int8` constant) from one that decompresses to half first.
    """
    for line in log.splitlines():
        match = _LINE.match(line)
        if match is None or match["kind"].strip() in _NOT_MATRIX:
            continue
        types = [tuple(kind.lower() for kind in _TYPE.findall(match[part] or "")) for part in ("inputs", "constants")]
        yield CompiledLayer(frozenset(_SOURCE.findall(match["metadata"])), types[0], types[1])
