"""`Network`: what a family's denoiser is, in torch and as a graph, whichever checkpoint its weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from torch import Tensor, nn

from sdq_export.conditioning import Conditioning
from sdq_export.step_state import StepState

__all__ = ["GraphCuts", "Network"]


@dataclass(frozen=True)
class GraphCuts:
    """How a captured denoiser is cut in two: what depends on the prompts alone, and the step.

    Attributes:
        prologue: passes that keep of a captured graph what depends on the prompts (and on the table of steps) alone;
            its inputs are conditioning tensors, its outputs named values [batch, ...].
        denoiser: passes that take those values as inputs [2*batch, ...] and put the time tables, looked up by the new
            input ``step``, in the time path's place.
    """

    prologue: list[ir.passes.InPlacePass]
    denoiser: list[ir.passes.InPlacePass]


class Network(ABC):
    """A kind of denoiser. It knows no checkpoint; `families.network_of` finds it by a denoiser.

    Attributes:
        blocks: classes of the blocks that block reconstruction optimizes at once.
    """

    blocks: ClassVar[tuple[str, ...]]

    @abstractmethod
    def owns(self, denoiser: nn.Module) -> bool:
        """Whether this is a denoiser of the kind."""

    def extra_channels(self, denoiser: nn.Module) -> int:
        """How many channels the denoiser takes beside the latents, for inpainting: 1 of the mask, C of the image.

        Raises:
            SdqError: another number.
        """
        return 0

    @abstractmethod
    def latent_multiple(self, denoiser: nn.Module) -> int:
        """What the latents' height and width must be multiples of where a graph takes any size.

        Raises:
            SdqError: the denoiser is of one size.
        """

    def latent_limit(self, denoiser: nn.Module) -> int | None:
        """The most that the latents' height and width may be where a graph takes any size; None for no limit."""
        return None

    @abstractmethod
    def predict(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One call as the pipeline makes it: latents [B, C, h, w], timesteps f32 [B] or [], of B prompts."""

    @abstractmethod
    def time_tables(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """What the denoiser makes of the timesteps alone, f32 [T, ...] by name, computed in FP32.

        Raises:
            SdqError: the time path is of a form that is not supported.
        """

    @abstractmethod
    def use_tables(self, denoiser: nn.Module, tables: Mapping[str, Tensor], state: StepState) -> None:
        """Put the tables, looked up by the steps of `state`, in the place of the time path; in place.

        What is left of the time path has no parameters: training does not touch it.
        """

    @abstractmethod
    def quantizable_layers(self, denoiser: nn.Module) -> dict[str, str]:
        """Path of each Conv2d and Linear that the denoiser's graph computes at every step -> the tensor that it reads.

        The name of the tensor says no more than which layers read the same one. Layers that are precomputed, by step
        or by prompt, are not among them.
        """

    @abstractmethod
    def capture(
        self, denoiser: nn.Module, latent_shape: tuple[int, int, int], tokens: int, multiple: int = 0
    ) -> ir.Model:
        """The denoiser's graph: ``sample`` f32 [2*batch, C, h, w], ``timestep``, then the conditioning's names.

        Args:
            denoiser: FP32, its time path in place.
            latent_shape: C, h, w; an inpainting denoiser's sample has its extra channels beside C.
            tokens: L.
            multiple: `latent_multiple`, to leave height and width free; 0 for those of `latent_shape` alone.
        """

    @abstractmethod
    def cuts(self, tables: Mapping[str, Tensor]) -> GraphCuts:
        """Passes that divide the captured denoiser, by the tables of `time_tables`."""
