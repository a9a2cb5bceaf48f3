"""Capture a torch module as an ONNX graph: `torch.onnx.export(dynamo=True)`; the batch, and if asked the size, free."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import Tensor, nn

from sdq_export.graph import NAME_SCOPES

__all__ = ["OPSET", "FreeSize", "capture"]

OPSET = 21
"""The first opset with INT4 and blocked DequantizeLinear."""

# What a boolean attention mask adds to a score. The second is the most negative FP16 number: as far as softmax can
# tell it is minus infinity, and an engine that computes in FP16 can hold it.
_KEPT, _MASKED = 0.0, -65504.0


@dataclass(frozen=True)
class FreeSize:
    """An input whose height and width are left free.

    Attributes:
        input: its name.
        multiple: what both must be multiples of, so that every level of the network halves evenly.
        names: of the two in the graph's shapes.
        limit: the most of either, where the network has one.
    """

    input: str
    multiple: int
    names: tuple[str, str]
    limit: int | None = None

    def dim(self, axis: int) -> Any:
        """The symbol of an axis, for `torch.export`."""
        most = None if self.limit is None else self.limit // self.multiple
        return self.multiple * torch.export.Dim(f"size_{axis}", min=2, max=most)


def capture(
    module: nn.Module,
    inputs: Mapping[str, Tensor | Mapping[str, Tensor]],
    *,
    batched: Sequence[str],
    outputs: Sequence[str],
    batch: str = "batch",
    static: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    sized: FreeSize | None = None,
    inside: str = "",
) -> ir.Model:
    """Export ``module`` as one ONNX graph of opset 21.

    Args:
        module: in eval mode, FP32.
        inputs: argument name -> an example, at least two samples where batched (a size of one would be specialized), or
            a dict of examples.
        batched: names of the inputs whose first axis is the batch.
        outputs: names for the outputs, in order.
        batch: the symbol for the batch size in every shape.
        static: further arguments that are not tensors.
        input_names: what the graph calls the inputs, those of a dict one by one; the arguments' names by default.
        sized: leaves height and width of one input [B, C, h, w] free; the example's must differ.
        inside: a submodule of ``module``, which is but a wrapper: layers and weights are named by their paths in it.

    Returns:
        The graph; its nodes carry ``pkg.torch.onnx.name_scopes``, weights their torch names where the exporter did
        not fold them.
    """
    extra = dict(static or {})
    names = list(input_names or inputs)
    shapes: dict[str, Any] = {name: _dynamic(value, name in batched) for name, value in inputs.items()}
    shapes |= dict.fromkeys(extra)
    if sized is not None:
        shapes[sized.input] |= {axis: sized.dim(axis) for axis in (2, 3)}
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, (), kwargs={**inputs, **extra}, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=list(outputs),
            verbose=False,
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
                torch.ops.aten.einsum.default: _einsum,
            },
        )
    assert exported is not None
    model = _detached(exported.model)
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    _name_dims(model, batch, sized)
    if inside:
        _leave_wrapper(model, inside)
    return model


def _leave_wrapper(model: ir.Model, inside: str) -> None:
    """Name layers and weights by their paths in a submodule."""
    for value in list(model.graph.initializers.values()):
        value.name = _within(value.name or "", inside)
    for node in model.graph:
        if (scopes := node.metadata_props.get(NAME_SCOPES)) is not None:
            node.metadata_props[NAME_SCOPES] = repr([_within(path, inside) for path in ast.literal_eval(scopes)])


def _within(path: str, inside: str) -> str:
    return "" if path == inside else path.removeprefix(f"{inside}.")


def _detached(exported: ir.Model) -> ir.Model:
    """A copy of the exporter's graph, which loses its constants.

    The rules of the exporter's optimizer live as long as the process and keep the node that they matched last, with it
    its graph and all weights: of Stable Diffusion v1-4 that was 5 GB after the graph had been written.
    """
    model = exported.clone()
    for value in exported.graph.initializers.values():
        value.const_value = None
    return model


def _dynamic(value: Tensor | Mapping[str, Tensor], batched: bool) -> Any:
    """Which axes of an input are free, in the form of `torch.export`."""
    if isinstance(value, Mapping):
        return {name: _dynamic(part, batched) for name, part in value.items()}
    return {0: torch.export.Dim.DYNAMIC} if batched else None


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as MatMul, Softmax, MatMul, the form that every engine's fusion looks for.

    torchlib's own translation transposes the keys through three dynamic reshapes, which hide the shapes from engines.
    """
    if is_causal or enable_gqa:
        raise NotImplementedError("causal or grouped-query attention inside a captured graph")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scaled = op.Mul(query, op.Constant(value_float=float(factor)))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        masked = attn_mask.dtype == ir.DataType.BOOL
        scores = op.Add(scores, op.Where(attn_mask, _KEPT, _MASKED) if masked else attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _einsum(equation: str, tensors: Sequence[Any], path: Sequence[int] | None = None) -> Any:
    """An Einsum that only reorders axes (the end of an MMDiT) is a Transpose, which every engine moves for free."""
    before, _, after = equation.replace(" ", "").partition("->")
    if len(tensors) == 1 and before.isalpha() and sorted(before) == sorted(after) and len(set(before)) == len(before):
        return op.Transpose(tensors[0], perm=[before.index(axis) for axis in after])
    return op.Einsum(*tensors, equation=equation)


def _name_dims(model: ir.Model, batch: str, sized: FreeSize | None) -> None:
    """Give the exporter's free symbols (``s53``, ``8*s16`` ...) our names; drop shapes that it did not work out."""
    graph = model.graph
    names: dict[str, tuple[int, str]] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                factor, symbol = _factor(str(dim))
                free = sized is not None and value.name == sized.input and axis >= 2
                names[symbol] = (factor, sized.names[axis - 2] if sized is not None and free else batch)
    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        if value.shape is None:
            continue
        dims = [dim if isinstance(dim, int) else _named(str(dim), names) for dim in value.shape]
        value.shape = None if None in dims else ir.Shape(dims)


def _factor(expression: str) -> tuple[int, str]:
    """``8*s16`` is 8 times ``s16``."""
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+)", expression.replace(" ", ""))
    return (int(found[1] or 1), found[2]) if found else (1, expression)


def _named(expression: str, names: Mapping[str, tuple[int, str]]) -> str | None:
    """What an inner dimension is of an input's, e.g. ``height/2`` or ``8*width``; None for more than one symbol."""
    factor, symbol = _factor(expression)
    if symbol not in names:
        return None
    unit, name = names[symbol]
    if factor % unit == 0:
        return name if factor == unit else f"{factor // unit}*{name}"
    return f"{name}/{unit // factor}" if unit % factor == 0 else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks about torchvision and its own deprecations are no news to a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
