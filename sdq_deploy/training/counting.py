"""What one forward of an architecture costs, counted on fake tensors, which have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdq_export.conditioning import Conditioning
from sdq_export.quantspec import QuantSpec
from sdq_export.sketch import count_flops
from sdq_export.stepping import StepDenoiser

__all__ = ["buffer_bytes", "count", "forward_flops", "layer_weight", "saved_bytes"]

_FP32 = 4


def _inputs(denoiser: StepDenoiser, shape: tuple[int, int, int], prompt: Conditioning) -> tuple[Any, ...]:
    return torch.randn(1, *shape), torch.zeros(1, dtype=torch.int64), prompt


def forward_flops(denoiser: StepDenoiser, shape: tuple[int, int, int], prompt: Conditioning) -> int:
    """Of one forward of one sample."""
    return count_flops(denoiser, *_inputs(denoiser, shape, prompt))


def saved_bytes(
    denoiser: StepDenoiser, shape: tuple[int, int, int], prompt: Conditioning, spec: QuantSpec, checkpointing: bool
) -> int:
    """Bytes that autograd keeps of one sample's forward; under gradient checkpointing also the largest block's."""
    denoiser.model.requires_grad_(True).train()
    blocks: list[int] = []

    def checkpointed(module: nn.Module, *arguments: Any) -> Any:
        with _saved() as inside, _quantizer_bytes(denoiser, spec) as quantizers:
            output = module(*arguments)
        blocks.append(inside() + quantizers())
        # what a checkpoint keeps instead: its inputs
        kept.append(sum(each.numel() * each.element_size() for each in arguments if isinstance(each, Tensor)))
        return output

    kept: list[int] = []
    if checkpointing:
        denoiser.model.enable_gradient_checkpointing(checkpointed)
    with _saved() as outside, _quantizer_bytes(denoiser, spec) as quantizers:
        denoiser(*_inputs(denoiser, shape, prompt))
    if not blocks:
        return outside() + quantizers()
    # the outer count has not seen what the inner ones took
    return outside() + sum(kept) + max(blocks)


@contextmanager
def _saved() -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves in the block, tensors of one storage once; parameters are not among them."""
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        origin = tensor if tensor._base is None else tensor._base
        if not isinstance(origin, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


@contextmanager
def _quantizer_bytes(denoiser: StepDenoiser, spec: QuantSpec) -> Iterator[Callable[[], int]]:
    """Bytes that fake quantization adds: the rounded copy of each site's tensor, FP32."""
    total = [0]

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total[0] += _FP32 * inputs[0].numel()

    handles = [
        denoiser.model.get_submodule(site.consumers[0]).register_forward_pre_hook(look) for site in spec.activations
    ]
    try:
        yield lambda: total[0]
    finally:
        for handle in handles:
            handle.remove()


def layer_weight(denoiser: StepDenoiser, layer: str) -> Tensor:
    """A layer's weight."""
    weight: Tensor = denoiser.model.get_parameter(f"{layer}.weight")
    return weight


def count(module: nn.Module) -> int:
    """Elements of the module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def buffer_bytes(module: nn.Module) -> int:
    """Of what the module keeps beside its parameters: time tables, layers that nothing trains."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
