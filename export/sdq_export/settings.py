"""What is asked of a package: how it is stored, what it can do, and how it is proved."""

from __future__ import annotations

from dataclasses import dataclass

from sdq_export.devices import DeviceChoice
from sdq_export.parity.budget import GateChoice
from sdq_export.parity.samples import PARITY_PROMPTS
from sdq_export.storage import Dtype, IntegerDtype, Storage

__all__ = ["PackageSettings"]


@dataclass(frozen=True)
class PackageSettings:
    """How a package is made.

    Attributes:
        dtype: how floating-point weights are stored.
        prologue: store those of a quantized package's prologue as integers; gated by its own parity criterion.
        text_encoder: store those of the text encoders as integers, gated likewise.
        vae: store those of the VAE as integers, gated likewise.
        prompts: for the parity samples.
        vae_encoder: whether the package may start from images.
        dynamic_size: leave height and width free in the graphs, for engines of other sizes.
        gate: how much of the denoiser's run parity looks at: "full", a number of calls, or by the denoiser's size.
        device: where teacher, reference and gate run; "auto" is the GPU where torch has one.
        engines: that will be built of it: their builders' memory is foreseen too.
        force: export although the memory or the disk does not seem to suffice.
    """

    dtype: Dtype = "fp16"
    prologue: IntegerDtype | None = None
    text_encoder: IntegerDtype | None = None
    vae: IntegerDtype | None = None
    prompts: tuple[str, ...] = PARITY_PROMPTS
    vae_encoder: bool = True
    dynamic_size: bool = False
    gate: GateChoice = "auto"
    device: DeviceChoice = "auto"
    engines: tuple[str, ...] = ()
    force: bool = False

    @property
    def storage(self) -> Storage:
        """How each component's weights are stored."""
        return Storage(self.dtype, self.prologue, self.text_encoder, self.vae)
