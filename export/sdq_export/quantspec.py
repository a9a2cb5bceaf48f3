"""QuantSpec: which tensors are quantized, to which formats, sharing which scales. Training and export agree by it.

A *site* is one quantized tensor: a weight, or an activation whose consumers share its parameters. Quantization is
symmetric without zero points (docs/quantization.md, "The grid"):

    x_hat = s * clip(round(x / s), low, high)        to the nearest code of the site's format, half to even
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer, model_validator

from sdq_engines.formats import (
    INT8,
    LayerFormats,
    NumberFormat,
    Operator,
    PrecisionName,
    formats_of,
    number_format,
)

__all__ = ["ActivationSite", "QuantSpec", "SiteFormat", "WeightSite", "fitting_block"]


def _read_format(value: Any) -> Any:
    return number_format(value) if isinstance(value, str) else value


#: A number format, written as its name.
SiteFormat = Annotated[
    InstanceOf[NumberFormat], BeforeValidator(_read_format), PlainSerializer(lambda format: format.name, str)
]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSite(_Frozen):
    """One quantized weight. Its codes are the tensor `<layer>.weight`, its scales `<layer>.weight_scale`.

    Scales are FP32, [C_out] per output channel, or [C_out, C_in / block_size] in blocks along a Linear's input.
    """

    layer: str
    """Module path in the denoiser, e.g. `mid_block.resnets.0.conv1`."""
    op: Operator
    format: SiteFormat
    """By channel, axis 0 of the torch weight for Conv2d and Linear alike, or in blocks."""

    @model_validator(mode="after")
    def _by_channel(self) -> WeightSite:
        if self.format.granularity == "tensor":
            raise ValueError(f"the weight of {self.layer} must have a scale per output channel or block")
        return self


class ActivationSite(_Frozen):
    """One quantized activation: the tensor that its consumers read. Its scales are `<name>.scale`, FP32 [G]."""

    name: str
    """`<first consumer>.input`."""
    consumers: tuple[str, ...] = Field(min_length=1)
    format: SiteFormat = INT8.per_tensor()
    groups: tuple[int, ...]
    """Step -> scale group; consecutive steps share a group, numbered from 0 without gaps."""

    @property
    def num_groups(self) -> int:
        """G, the number of scales."""
        return self.groups[-1] + 1

    @model_validator(mode="after")
    def _consecutive(self) -> ActivationSite:
        if self.format.granularity != "tensor":
            raise ValueError(f"{self.name} must have one scale for the tensor")
        if self.groups[0] != 0 or any(b - a not in (0, 1) for a, b in zip(self.groups, self.groups[1:], strict=False)):
            raise ValueError(f"the groups of {self.name} must start at 0 and rise by 0 or 1 a step: {self.groups}")
        return self


class QuantSpec(_Frozen):
    """Every site of a quantized denoiser."""

    version: Literal[1] = 1
    precision: PrecisionName
    num_steps: int = Field(gt=0)
    """T, the number of model calls in one full run."""
    weights: tuple[WeightSite, ...]
    activations: tuple[ActivationSite, ...]

    @model_validator(mode="after")
    def _consistent(self) -> QuantSpec:
        layers = Counter(site.layer for site in self.weights)
        consumers = Counter(layer for site in self.activations for layer in site.consumers)
        problems = [f"{layer} has {count} weight sites" for layer, count in layers.items() if count > 1]
        problems += [f"{layer} reads {count} activation sites" for layer, count in consumers.items() if count > 1]
        problems += [f"{layer} has an activation site but no weight site" for layer in consumers if layer not in layers]
        problems += [
            f"{site.name} has groups for {len(site.groups)} steps, {self.num_steps} are wanted"
            for site in self.activations
            if len(site.groups) != self.num_steps
        ]
        if problems:
            raise ValueError("; ".join(problems))
        assert self.formats.keys() == layers.keys()  # each pair is one that a layer may have
        return self

    @property
    def splits_shortcuts(self) -> bool:
        """Whether the sites are those of a denoiser with split shortcuts (`sdq_export.shortcuts`)."""
        return any(site.layer.endswith(".conv_shortcut.skip") for site in self.weights)

    @property
    def weight_sites(self) -> dict[str, WeightSite]:
        """Weight sites by layer."""
        return {site.layer: site for site in self.weights}

    @property
    def activation_of(self) -> dict[str, ActivationSite]:
        """The activation site that each layer reads; layers without one are absent (w4a16's Linear)."""
        return {layer: site for site in self.activations for layer in site.consumers}

    @property
    def formats(self) -> dict[str, LayerFormats]:
        """What the operands of each quantized layer are quantized to."""
        inputs = self.activation_of
        return {
            site.layer: formats_of(site.format, inputs[site.layer].format if site.layer in inputs else None)
            for site in self.weights
        }


def fitting_block(width: int, block_size: int) -> int | None:
    """The block, halved until it divides the width; None where that would leave fewer than 16."""
    while block_size >= 16:
        if width % block_size == 0:
            return block_size
        block_size //= 2
    return None
