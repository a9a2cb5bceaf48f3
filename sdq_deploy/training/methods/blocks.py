"""The blocks of a denoiser, what flows into one, and what comes out.

A block is what reconstruction optimizes at once: a ResNet block, an attention block with its projections, or a
quantized layer that stands alone (down- and upsampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.training.dataset import SerialData
from sdq_export.conditioning import Conditioning
from sdq_export.quantspec import QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = [
    "Block",
    "BlockInputs",
    "Samples",
    "block_inputs",
    "block_outputs",
    "find_blocks",
    "pick_samples",
    "run_block",
]

#: Samples that go through the denoiser together.
BATCH = 16


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        name: path of its module.
        layers: its weight sites.
        activations: names of the activation sites that they read.
    """

    name: str
    layers: tuple[str, ...]
    activations: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """Model inputs on the CPU: latents f32 [N, C, h, w], steps int64 [N], and what the denoiser is told of prompts."""

    latents: Tensor
    steps: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class BlockInputs:
    """A block's arguments for all samples, tensors of N samples joined, and the samples' steps; on the CPU."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    steps: Tensor

    def rows(self, rows: Tensor, device: torch.device) -> BlockInputs:
        """Those of some samples, on a device."""

        def take(value: Any) -> Any:
            return value[rows].to(device) if isinstance(value, Tensor) else value

        keywords = {name: take(value) for name, value in self.keywords.items()}
        return BlockInputs(tuple(map(take, self.arguments)), keywords, self.steps[rows].to(device))


def find_blocks(denoiser: StepDenoiser, spec: QuantSpec, samples: Samples) -> list[Block]:
    """The blocks that hold weight sites, in the order in which the denoiser runs them.

    Args:
        denoiser: any; it runs once.
        spec: the sites.
        samples: of which the first is run.
    """
    modules = dict(denoiser.model.named_modules())
    owners = {site.layer: _owner(site.layer, modules, denoiser.network.blocks) for site in spec.weights}
    order: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: order.append(name) if name not in order else None

    handles = [modules[name].register_forward_pre_hook(note(name)) for name in dict.fromkeys(owners.values())]
    try:
        _run(denoiser, samples, torch.arange(1))
    finally:
        for handle in handles:
            handle.remove()
    blocks = []
    for name in order:
        layers = tuple(layer for layer, owner in owners.items() if owner == name)
        read = tuple(site.name for site in spec.activations if set(site.consumers) & set(layers))
        blocks.append(Block(name, layers, read))
    return blocks


def _owner(layer: str, modules: dict[str, nn.Module], kinds: Sequence[str]) -> str:
    parts = layer.split(".")
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        if type(modules[path]).__name__ in kinds:
            return path
    return layer


def pick_samples(data: SerialData, rows: Tensor) -> Samples:
    """Model inputs of some latents; under guidance every other one sees the empty prompt."""
    conditioning = data.conditioning[data.shard.prompt_ids[rows]]
    if data.guided:
        conditioning = conditioning.replace(slice(1, None, 2), data.empty)
    return Samples(data.shard.latents[rows], data.shard.steps[rows], conditioning)


class _Reached(Exception):
    """The block has been reached: the rest of the denoiser need not run."""


def block_inputs(denoiser: StepDenoiser, block: Block, samples: Samples) -> BlockInputs:
    """What reaches a block when the denoiser runs over the samples."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, arguments: Any, keywords: Any) -> None:
        found.append((tuple(map(_to_cpu, arguments)), {name: _to_cpu(value) for name, value in keywords.items()}))
        raise _Reached

    with _hooked(denoiser, block, catch):
        for rows in torch.split(torch.arange(len(samples.steps)), BATCH):
            try:
                _run(denoiser, samples, rows)
            except _Reached:
                continue
    arguments = tuple(_join(values) for values in zip(*(part for part, _ in found), strict=True))
    keywords = {name: _join([part[name] for _, part in found]) for name in found[0][1]}
    return BlockInputs(arguments, keywords, samples.steps)


@contextmanager
def _hooked(denoiser: StepDenoiser, block: Block, hook: Any) -> Iterator[None]:
    module: nn.Module = denoiser.model.get_submodule(block.name)
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def block_outputs(denoiser: StepDenoiser, block: Block, inputs: BlockInputs) -> Tensor:
    """What a block makes of its inputs, f32 [N, ...] on the CPU."""
    device = next(denoiser.parameters()).device
    parts = torch.split(torch.arange(len(inputs.steps)), BATCH)
    return torch.cat([run_block(denoiser, block, inputs.rows(rows, device)).cpu() for rows in parts])


def run_block(denoiser: StepDenoiser, block: Block, inputs: BlockInputs) -> Tensor:
    """One call of the block by itself, with the steps of its samples; several outputs joined along the tokens."""
    module: nn.Module = denoiser.model.get_submodule(block.name)
    with denoiser.state.during(inputs.steps):
        output: Any = module(*inputs.arguments, **inputs.keywords)
    if not isinstance(output, tuple):
        result: Tensor = output
        return result
    # a joint attention's block gives the text's tokens and the image's, its last one the image's alone
    streams = [stream for stream in output if stream is not None]
    return streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)


@torch.no_grad()
def _run(denoiser: StepDenoiser, samples: Samples, rows: Tensor) -> None:
    device = next(denoiser.parameters()).device
    denoiser(samples.latents[rows].to(device), samples.steps[rows].to(device), samples.conditioning[rows].to(device))


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _join(values: Any) -> Any:
    return torch.cat(tuple(values)) if isinstance(values[0], Tensor) else values[0]
