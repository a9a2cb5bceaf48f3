"""Guidance: which rows of the denoiser an image takes, which text each of them reads, and how they become one.

Plain data that training, export and the runtime ask; what combines predictions in torch is in the room above
(`sdq_export.guidance`), and in a package's graph the combination is compiled in. docs/architecture.md says how a kind
is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = ["Guidance", "GuidanceKind", "Text"]

#: `classifier-free` (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022) evaluates the model with and without
#: the prompt; `embedded` is a model that was told the scale in training and takes it as an input, beside the timestep
#: (Meng et al., "On Distillation of Guided Diffusion Models", 2023); `none` evaluates it with the prompt alone.
GuidanceKind = Literal["classifier-free", "embedded", "none"]

#: What a row reads: the negative prompt (the empty one where the user gives none), or the prompt.
Text = Literal["negative", "prompt"]


@dataclass(frozen=True)
class Guidance:
    """How strongly an image follows its prompt, and by what.

    Attributes:
        kind: see `GuidanceKind`.
        scale: of the kind; 1 for none.
    """

    TEXTS: ClassVar[dict[GuidanceKind, tuple[Text, ...]]] = {
        "classifier-free": ("negative", "prompt"),
        "embedded": ("prompt",),
        "none": ("prompt",),
    }

    kind: GuidanceKind
    scale: float

    @classmethod
    def classifier_free(cls, scale: float) -> Guidance:
        """By this scale; a scale of 1 or less is no guidance, as in diffusers (`do_classifier_free_guidance`)."""
        return cls("classifier-free", float(scale)) if scale > 1 else cls("none", 1.0)

    @property
    def texts(self) -> tuple[Text, ...]:
        """The text of each row that an image takes, in the order of the rows."""
        return self.TEXTS[self.kind]

    @property
    def rows(self) -> int:
        """How many evaluations of the denoiser an image takes at a step."""
        return len(self.texts)
