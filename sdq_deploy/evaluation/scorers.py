"""Which metrics an evaluation can take: those that need nothing, and those whose local weights were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdq_deploy.evaluation.prompts import PromptSet
from sdq_deploy.evaluation.scoring import FeatureSpace, ImageScorer, caption_scorer, classifier_space, fidelity_scorer
from sdq_deploy.evaluation.statistics import Moments
from sdq_engines.errors import SdqError

__all__ = ["Scorers", "choose_scorers"]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_REAL_BATCH = 32


@dataclass
class Scorers:
    """The chosen metrics.

    Attributes:
        against: take the reference's images too.
        own: look at one set of images and its prompts alone.
        spaces: for Fréchet distances.
        real: feature space -> moments of the real images.
        skipped: a sentence for each metric that is not taken.
    """

    against: list[ImageScorer] = field(default_factory=list)
    own: list[ImageScorer] = field(default_factory=list)
    spaces: list[FeatureSpace] = field(default_factory=list)
    real: dict[str, Moments] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Metrics with one value an image."""
        return [name for scorer in (*self.against, *self.own) for name in scorer.names]


def choose_scorers(
    prompts: PromptSet,
    image_size: tuple[int, int],
    *,
    real: Path | None = None,
    lpips: Path | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    device: str = "cpu",
) -> Scorers:
    """Load what can be taken.

    Args:
        prompts: whether the caption classifier can be used depends on them.
        image_size: (height, width).
        real: a folder of real images.
        lpips, inception, clip: local weights.
        device: of torch.

    Raises:
        SdqError: weights that were given do not load, or real images that were given cannot be used.
    """
    chosen = Scorers(against=[fidelity_scorer()])
    _add_classifier(chosen, prompts, image_size)
    _add_given(chosen, prompts, lpips, inception, clip, device)
    if real is not None:
        _measure_real(chosen, real, image_size)
    return chosen


def _add_classifier(chosen: Scorers, prompts: PromptSet, image_size: tuple[int, int]) -> None:
    if prompts.contents is None or image_size != (64, 64):
        chosen.skipped.append(
            "Caption accuracy and feature-FID were skipped: the classifier knows captions and images of shapes-64."
        )
        return
    chosen.own.append(caption_scorer(prompts, prompts.contents))
    chosen.spaces.append(classifier_space())


def _add_given(
    chosen: Scorers, prompts: PromptSet, lpips: Path | None, inception: Path | None, clip: Path | None, device: str
) -> None:
    """Those whose weights are not ours to ship."""
    from sdq_deploy.evaluation.perceptual import clip_scorer, inception_space, lpips_scorer

    if lpips is not None:
        chosen.against.append(lpips_scorer(lpips, device))
    else:
        chosen.skipped.append("LPIPS was skipped: give AlexNet's weights with --lpips FILE.")
    if inception is not None:
        chosen.spaces.append(inception_space(inception, device))
    else:
        chosen.skipped.append("FID was skipped: give Inception's weights with --inception FILE.")
    if clip is not None:
        chosen.own.append(clip_scorer(clip, prompts.prompts, device))
    else:
        chosen.skipped.append("The CLIP score was skipped: give a CLIP model with --clip FOLDER.")


def _measure_real(chosen: Scorers, folder: Path, image_size: tuple[int, int]) -> None:
    """Moments of the real images in every feature space."""
    import numpy as np
    from PIL import Image

    if not chosen.spaces:
        raise SdqError(
            "Real images were given, but nothing to compare them with: no features are taken.",
            "Give the weights of Inception: --inception FILE",
        )
    files = _image_files(folder)
    chosen.real = {space.name: Moments() for space in chosen.spaces}
    height, width = image_size
    for first in range(0, len(files), _REAL_BATCH):
        pixels = []
        for file in files[first : first + _REAL_BATCH]:
            try:
                with Image.open(file) as image:
                    pixels.append(np.asarray(image.convert("RGB")))
            except OSError as error:
                raise SdqError(
                    f"The real image {file} cannot be read: {error}.", "Take it out of the folder."
                ) from error
            if pixels[-1].shape[:2] != image_size:
                found = f"{pixels[-1].shape[1]}x{pixels[-1].shape[0]}"
                raise SdqError(
                    f"The real image {file} has {found} pixels, {width}x{height} are wanted.",
                    "Crop and resize the real images as the model's training data was.",
                )
        for space in chosen.spaces:
            chosen.real[space.name].update(space.extract(np.stack(pixels)))


def _image_files(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise SdqError(f"The folder of real images {folder} does not exist.", "Give another with --real FOLDER.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
    if len(files) < 2:
        raise SdqError(
            f"{folder} holds {len(files)} images; a Fréchet distance needs two at least.",
            f"Images are files that end in {', '.join(sorted(_IMAGE_SUFFIXES))}: --real FOLDER",
        )
    return files
