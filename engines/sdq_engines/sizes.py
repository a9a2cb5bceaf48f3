"""Image sizes as people write them, WIDTHxHEIGHT, and which of them a package and an engine take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import Manifest, ModelIO, ShapeProfile, Size
from sdq_engines.package.store import Package

__all__ = ["check_size", "check_sizes", "named", "parse_size", "profile_of_sizes", "requested_size", "source_of"]


def named(size: Size) -> str:
    """(height, width) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def parse_size(text: str) -> Size:
    """(height, width) of WIDTHxHEIGHT.

    Raises:
        SdqError: it is something else.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text.strip())
    if found is None:
        raise SdqError(f"{text!r} is no size; WIDTHxHEIGHT in pixels is wanted.", "For example --size 768x512")
    return int(found[2]), int(found[1])


def profile_of_sizes(profile: ShapeProfile, sizes: Sequence[Size]) -> ShapeProfile:
    """The profile from the least to the most of these heights and widths, tuned for the first; none changes nothing."""
    if not sizes:
        return profile
    heights, widths = zip(*sizes, strict=True)
    low, high = (min(heights), min(widths)), (max(heights), max(widths))
    return profile.model_copy(update={"size_min": low, "size_opt": sizes[0], "size_max": high})


def check_sizes(package: Package, profile: ShapeProfile) -> None:
    """Raises: SdqError: a size of the profile that the package's graphs do not take, or sizes that are not in order."""
    sizes = profile.sizes(package.manifest.io)
    for size in sizes:
        check_size(package.manifest, size, str(package.folder))
    for low, best, high in zip(*sizes, strict=True):
        if not low <= best <= high:
            raise SdqError(
                f"The sizes {', '.join(named(size) for size in sizes)} are not in order: min, opt, max.", "Sort them."
            )


def check_size(manifest: Manifest, size: Size, folder: str) -> None:
    """Raises: SdqError: the package's graphs do not take images of this size."""
    io = manifest.io
    if size == io.image_size:
        return
    if io.size_multiple is None:
        raise SdqError(
            f"The graphs of this package make images of {named(io.image_size)} only; {named(size)} was asked for.",
            f"Export it with free sizes: sdq-deploy export {source_of(manifest)} --out {folder} --dynamic-size",
        )
    if any(length % io.size_multiple for length in size):
        raise SdqError(
            f"{named(size)} is no size of this package: width and height are multiples of {io.size_multiple}.",
            f"The nearest: {named(_nearest(size, io))}.",
        )
    if io.size_limit is not None and max(size) > io.size_limit:
        raise SdqError(
            f"{named(size)} is too large for this package's model: width and height are at most {io.size_limit}.",
            f"The nearest: {named(_nearest(size, io))}.",
        )


def source_of(manifest: Manifest) -> str:
    """What to name to export the package again: its model, or for a quantized one the run that is not recorded."""
    return "RUN" if manifest.is_quantized else manifest.source.model


def requested_size(package: Package, engine: str, profile: ShapeProfile, height: int | None, width: int | None) -> Size:
    """The (height, width) to make: what was asked for, else the package's own, else what the engine is tuned for.

    Raises:
        SdqError: a size that the package does not take, or that is outside of the engine's profile.
    """
    io = package.manifest.io
    low, best, high = profile.sizes(io)
    default = io.image_size if profile.takes(io.image_size, io) else best
    size = (default[0] if height is None else height, default[1] if width is None else width)
    if io.size_multiple is None and size != io.image_size:
        name, asked = ("height", size[0]) if size[0] != io.image_size[0] else ("width", size[1])
        raise SdqError(
            f"This package cannot honour {name}={asked}: its graphs make images of {named(io.image_size)} only.",
            f"Export it with free sizes: sdq-deploy export {source_of(package.manifest)} "
            f"--out {package.folder} --dynamic-size",
        )
    check_size(package.manifest, size, str(package.folder))
    if not profile.takes(size, io):
        takes = named(low) if low == high else f"{named(low)} to {named(high)}"
        wanted = [best, low, high, size] if low != high else [best, size]
        options = " ".join(f"--size {named(each)}" for each in dict.fromkeys(wanted))
        raise SdqError(
            f"The {engine} engine was built for images of {takes}; {named(size)} was asked for.",
            f"Build it for both: sdq-deploy build {package.folder} --engine {engine} {options}",
        )
    return size


def _nearest(size: Size, io: ModelIO) -> Size:
    multiple = io.size_multiple or 1
    most = io.size_limit or max(size) + multiple
    height, width = (min(max(1, round(length / multiple)) * multiple, most) for length in size)
    return height, width
