"""Choose the sites: an explicit list of what is quantized, never a wildcard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn

from sdq_export.families import family_of
from sdq_export.quantspec import ActivationSite, OpKind, QuantizedPrecision, QuantSpec, WeightSite

__all__ = ["DEFAULT_KEEP", "MAX_DEFAULT_GROUPS", "find_sites", "fitting_block", "step_groups"]

#: The layers at the ends see raw latents; every paper of the field keeps them.
DEFAULT_KEEP = ("conv_in", "conv_out")

#: One scale per step up to this many steps, then as many groups of consecutive steps.
MAX_DEFAULT_GROUPS = 50

_WEIGHT_BITS = {"w8a8": 8, "w4a8": 4, "w4a16": 4}


def step_groups(num_steps: int, groups: int | None) -> tuple[int, ...]:
    """Step -> scale group: `groups` runs of consecutive steps as equal as can be (None: one a step, at most 50)."""
    count = min(num_steps, groups or MAX_DEFAULT_GROUPS)
    return tuple(step * count // num_steps for step in range(num_steps))


def find_sites(
    denoiser: nn.Module,
    num_steps: int,
    precision: QuantizedPrecision,
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
    3. w4a16: Linear layers have 4-bit weights in blocks along the input and no activation site, Conv2d is w8a8.

    Args:
        denoiser: its time path in place or replaced.
        num_steps: T, model calls in one full run.
        keep: globs over layer paths that stay in floating point.
        bits: glob -> weight bits (4 or 8), overriding the precision's; the last glob that fits decides.
        groups: number of scale groups; None for one a step, at most 50.
        block_size: w4a16's block; halved until it divides the input, at least 16, else one scale per channel.
    """
    weights: list[WeightSite] = []
    readers: dict[str, list[str]] = {}
    for layer, tensor in family_of(denoiser).quantizable_layers(denoiser).items():
        if any(fnmatchcase(layer, glob) for glob in keep):
            continue
        module = denoiser.get_submodule(layer)
        op: OpKind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        weight_only = precision == "w4a16" and op == "linear"
        default = 8 if precision == "w4a16" and op == "conv" else _WEIGHT_BITS[precision]
        chosen = cast(Literal[4, 8], _bits_of(layer, bits or {}, default))
        block = fitting_block(cast(nn.Linear, module).in_features, block_size) if weight_only and chosen == 4 else None
        weights.append(WeightSite(layer=layer, op=op, bits=chosen, block_size=block))
        if not weight_only:
            readers.setdefault(tensor, []).append(layer)
    grouped = step_groups(num_steps, groups)
    activations = [
        ActivationSite(name=f"{layers[0]}.input", consumers=tuple(layers), groups=grouped)
        for layers in readers.values()
    ]
    return QuantSpec(precision=precision, num_steps=num_steps, weights=tuple(weights), activations=tuple(activations))


def _bits_of(layer: str, bits: Mapping[str, int], default: int) -> int:
    fitting = [value for glob, value in bits.items() if fnmatchcase(layer, glob)]
    return fitting[-1] if fitting else default


def fitting_block(width: int, block_size: int) -> int | None:
    """The block, halved until it divides the width; None where that would leave fewer than 16."""
    while block_size >= 16:
        if width % block_size == 0:
            return block_size
        block_size //= 2
    return None
