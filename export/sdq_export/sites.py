"""Choose the sites: an explicit list of what is quantized, never a wildcard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from sdq_engines.errors import SdqError
from sdq_engines.formats import PRECISIONS, LayerFormats, NumberFormat, Operator, PrecisionName
from sdq_export.families import network_of
from sdq_export.quantspec import ActivationSite, QuantSpec, WeightSite, fitting_block

__all__ = ["DEFAULT_KEEP", "MAX_DEFAULT_GROUPS", "find_sites", "step_groups"]

#: The layers at the ends see raw latents; every paper of the field keeps them.
DEFAULT_KEEP = ("conv_in", "conv_out")

#: One scale per step up to this many steps, then as many groups of consecutive steps.
MAX_DEFAULT_GROUPS = 50


def step_groups(num_steps: int, groups: int | None) -> tuple[int, ...]:
    """Step -> scale group: `groups` runs of consecutive steps as equal as can be (None: one a step, at most 50)."""
    count = min(num_steps, groups or MAX_DEFAULT_GROUPS)
    return tuple(step * count // num_steps for step in range(num_steps))


def find_sites(
    denoiser: nn.Module,
    num_steps: int,
    precision: PrecisionName,
    *,
    keep: Sequence[str] = DEFAULT_KEEP,
    bits: Mapping[str, int] | None = None,
    groups: int | None = None,
    block_size: int = 64,
) -> QuantSpec:
    """List the sites of a denoiser.

    1. Every Conv2d and Linear is a weight site, but for what is precomputed by step or by prompt (the family says
       which, `Family.quantizable_layers`) and the layers that a glob of `keep` names.
    2. Each weight site's input is an activation site; query, key and value of one self-attention share theirs.
    3. Their formats are the precision's for convolutions and for linear layers; a layer whose input stays in floating
       point has no activation site.

    Args:
        denoiser: its time path in place or replaced.
        num_steps: T, model calls in one full run.
        keep: globs over layer paths that stay in floating point.
        bits: glob -> weight bits, overriding the precision's; the last glob that fits decides.
        groups: number of scale groups; None for one a step, at most 50.
        block_size: of weights in blocks; halved until it divides the input, at least 16, else one scale per channel.

    Raises:
        SdqError: the precision has no weights of as many bits as `bits` asks for.
    """
    weights: list[WeightSite] = []
    readers: dict[str, list[str]] = {}
    inputs: dict[str, NumberFormat] = {}
    for layer, tensor in network_of(denoiser).quantizable_layers(denoiser).items():
        if any(fnmatchcase(layer, glob) for glob in keep):
            continue
        module = denoiser.get_submodule(layer)
        op: Operator = "conv" if isinstance(module, nn.Conv2d) else "linear"
        formats = _formats_of(layer, bits or {}, precision, op)
        weight = formats.weight
        if weight.granularity == "block":
            block = fitting_block(cast(nn.Linear, module).in_features, block_size)
            weight = weight.in_blocks(block) if block is not None else weight.per_channel()
        weights.append(WeightSite(layer=layer, op=op, format=weight))
        if formats.activation is not None:
            readers.setdefault(tensor, []).append(layer)
            inputs[tensor] = formats.activation
    grouped = step_groups(num_steps, groups)
    activations = [
        ActivationSite(name=f"{layers[0]}.input", consumers=tuple(layers), format=inputs[tensor], groups=grouped)
        for tensor, layers in readers.items()
    ]
    return QuantSpec(precision=precision, num_steps=num_steps, weights=tuple(weights), activations=tuple(activations))


def _formats_of(layer: str, bits: Mapping[str, int], precision: PrecisionName, op: Operator) -> LayerFormats:
    """The precision's formats, the weight's by the last glob that fits."""
    formats = PRECISIONS[precision].of(op)
    fitting = [glob for glob in bits if fnmatchcase(layer, glob)]
    if not fitting:
        return formats
    chosen = formats.with_weight_bits(bits[fitting[-1]])
    if chosen is None:
        raise SdqError(
            f"{precision} has no weights of {bits[fitting[-1]]} bits, which quantization.bits asks for by "
            f"{fitting[-1]!r} (found at {layer}).",
            "Take it out of quantization.bits, or choose another --precision.",
        )
    return chosen
