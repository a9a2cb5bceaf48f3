"""What a shape profile means for the graphs: the extent of every free dimension, by its name in their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdq_engines.package.layout import VAE_ENCODER, runs_per_prompt
from sdq_engines.package.schema import ModelIO, ShapeProfile

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Extent", "extents", "fixed_size", "input_dims"]

Extent = tuple[int, int, int]
"""Least, tuned for, most."""


def extents(component: str, profile: ShapeProfile, io: ModelIO) -> dict[str, Extent]:
    """Of `batch`, `2*batch`, and where the package's size is free `height`, `width`, `image_height`, `image_width`.

    "batch" counts images; in the text components texts, at most two an image. Images to start from are encoded one at
    a time.
    """
    batch = (profile.batch_min, profile.batch_opt, profile.batch_max)
    if runs_per_prompt(component):
        batch = (1, 2, 2 * profile.batch_max)
    elif component == VAE_ENCODER:
        batch = (1, 1, profile.batch_max)
    found: dict[str, Extent] = {"batch": batch, "2*batch": _times(batch, 2)}
    if io.size_multiple:
        sizes = profile.sizes(io)
        factor = io.image_size[0] // io.latent_shape[1]
        for axis, name in enumerate(("height", "width")):
            low, best, high = (size[axis] for size in sizes)
            found[f"image_{name}"] = (low, best, high)
            found[name] = (low // factor, best // factor, high // factor)
    return found


def _times(extent: Extent, factor: int) -> Extent:
    low, best, high = extent
    return factor * low, factor * best, factor * high


def fixed_size(component: str, profile: ShapeProfile, io: ModelIO) -> list[ir.passes.PassBase]:
    """For a profile of one size: the pass that writes it into the graph, so that an engine compiles for it alone."""
    from sdq_engines.lowering.fix_dims import FixDims

    found = extents(component, profile, io)
    sizes = {name: extent[0] for name, extent in found.items() if "batch" not in name and extent[0] == extent[2]}
    return [FixDims(sizes)] if sizes else []


def input_dims(graph: ir.Model) -> Mapping[str, list[int | str]]:
    """Each input's dimensions: numbers, and names of the free ones."""
    dims: dict[str, list[int | str]] = {}
    for value in graph.graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        dims[value.name] = [dim if isinstance(dim, int) else str(dim.value).replace(" ", "") for dim in value.shape]
    return dims
