"""A manifest holds what its graphs take and give, or it is refused when it is loaded.

Hashes say that files are the ones that were written; a manifest that was edited or damaged may still name inputs that
its graphs do not have (docs/package-format.md, "Graphs").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sdq_engines.backends.base import Component, Session
from sdq_engines.errors import SdqError
from sdq_engines.package.layout import DENOISER, MANIFEST, PROLOGUE, VAE_DECODER
from sdq_engines.package.schema import EXTRA_CHANNELS, SIZE_INPUT, Manifest
from sdq_engines.package.store import Package

__all__ = ["check_interface"]

Shape = Sequence[int | None]
"""None where a dimension may be anything."""


def check_interface(package: Package, session: Session) -> None:
    """Hold every graph that makes an image against the manifest; loads them, the VAE encoder is left.

    Raises:
        SdqError: naming the component, and what the manifest says and the graph does not.
    """
    manifest, where = package.manifest, package.folder / MANIFEST
    text = [each.component for each in manifest.text]
    for name in (*text, PROLOGUE, DENOISER, VAE_DECODER):
        if name not in manifest.components or name not in session.entry.components:
            raise _contradiction(where, f"it lists no component {name!r} (engine {session.name})")
    encoded = {SIZE_INPUT}
    for each in manifest.text:
        encoder = session.component(each.component)
        _takes(where, each.component, encoder, {"input_ids": (None, each.max_length)})
        encoded |= set(encoder.outputs)
    _gives(where, "the text encoders", encoded, manifest.io.prologue_inputs)
    prologue = session.component(PROLOGUE)
    _takes(where, PROLOGUE, prologue, dict.fromkeys(manifest.io.prologue_inputs))
    _gives(where, PROLOGUE, prologue.outputs, manifest.io.prologue_outputs)
    denoiser, inputs = session.component(DENOISER), _denoiser_inputs(manifest)
    _takes(where, DENOISER, denoiser, inputs)
    _gives(where, DENOISER, denoiser.outputs, [f"{name}_out" for name in ("latents", "history") if name in inputs])
    decoder = session.component(VAE_DECODER)
    _takes(where, VAE_DECODER, decoder, {"latents": (None, *manifest.io.latent_shape)}, free_size=_is_free(manifest))
    _gives(where, VAE_DECODER, decoder.outputs, ["images"])


def _denoiser_inputs(manifest: Manifest) -> dict[str, Shape | None]:
    io, sampler = manifest.io, manifest.sampler
    channels, *size = io.latent_shape
    height, width = (None, None) if _is_free(manifest) else size
    slots = 1 + sampler.history
    inputs: dict[str, Shape | None] = {
        **dict.fromkeys(io.prologue_outputs),
        "latents": (None, channels, height, width),
        "guidance_scale": (),
        "step": (),
        "coefficients": (slots * slots + 3 * slots,),
    }
    if sampler.history:
        inputs["history"] = (None, sampler.history, channels, height, width)
    if sampler.stochastic:
        inputs["noise"] = (None, channels, height, width)
    if io.extra_channels:
        inputs[EXTRA_CHANNELS] = (None, io.extra_channels, height, width)
    return inputs


def _is_free(manifest: Manifest) -> bool:
    return manifest.io.size_multiple is not None


def _takes(
    where: object, name: str, component: Component, wanted: Mapping[str, Shape | None], free_size: bool = False
) -> None:
    """The component's inputs are these, of these shapes; None is any."""
    for given in wanted:
        if given not in component.inputs:
            raise _contradiction(where, f"it has {given!r} as an input of {name}, whose graph takes no such input")
    for taken, has in component.inputs.items():
        if taken not in wanted:
            raise _contradiction(where, f"the graph of {name} takes {taken!r}, which it does not mention")
        shape = wanted[taken]
        if shape is None:
            continue
        if free_size:
            shape = (*shape[:-2], None, None)
        if len(shape) != len(has) or any(a != b for a, b in zip(shape, has, strict=True) if None not in (a, b)):
            raise _contradiction(
                where, f"it makes {taken} of {name} {_spelled(shape)}, and the graph takes {_spelled(has)}"
            )


def _gives(where: object, name: str, has: Iterable[str], wanted: Iterable[str]) -> None:
    given = set(has)
    for output in wanted:
        if output not in given:
            raise _contradiction(where, f"it has {output!r} as an output of {name}, which gives no such output")


def _spelled(shape: Shape) -> str:
    return f"[{', '.join('any' if dim is None else str(dim) for dim in shape)}]"


def _contradiction(where: object, what: str) -> SdqError:
    return SdqError(
        f"{where} contradicts the package's graphs: {what}.",
        "Get the package again from its source, or export it again.",
    )
