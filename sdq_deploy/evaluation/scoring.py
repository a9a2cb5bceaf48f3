"""Read a candidate's images back, batch by batch, and score them; nothing but scores and features is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdq_deploy.evaluation.metrics import compare_images
from sdq_deploy.evaluation.prompts import Contents, PromptSet
from sdq_deploy.evaluation.statistics import Moments
from sdq_deploy.evaluation.store import ImageStore

__all__ = ["FeatureSpace", "ImageScorer", "Scores", "caption_scorer", "classifier_space", "fidelity_scorer", "score"]

Images = NDArray[np.uint8]
Values = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class ImageScorer:
    """Metrics with one value an image.

    Attributes:
        names: of the metrics, as in the catalogue.
        take: called with images, the reference's images (both uint8 [N, H, W, 3]) and their numbers; gives
            metric -> float64 [N].
    """

    names: tuple[str, ...]
    take: Callable[[Images, Images, Sequence[int]], Values]


@dataclass(frozen=True)
class FeatureSpace:
    """Features whose distribution is compared.

    Attributes:
        name: of the Fréchet distance to the reference in the catalogue; that to real images is `<name>_real`.
        dimensions: D.
        extract: uint8 [N, H, W, 3] to floating-point [N, D].
        kept: whether features are few enough to be kept for the bootstrap; else only their moments are.
    """

    name: str
    dimensions: int
    extract: Callable[[Images], NDArray[Any]]
    kept: bool


@dataclass
class Scores:
    """What scoring one candidate leaves in memory.

    Attributes:
        values: metric -> float64 [N].
        moments: feature space -> moments of all images.
        features: feature space -> float32 [N, D], where they are kept.
    """

    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def score(
    store: ImageStore,
    reference: ImageStore,
    count: int,
    scorers: Sequence[ImageScorer],
    spaces: Sequence[FeatureSpace],
    batch_size: int,
    on_images: Callable[[int], Any] = lambda count: None,
) -> Scores:
    """Score images 0..count-1 of a candidate, or of the reference itself.

    Args:
        store, reference: whose images, and those they are held against.
        count: how many.
        scorers, spaces: what to take.
        batch_size: images in memory at once.
        on_images: hears how many were just scored.
    """
    found = Scores(moments={space.name: Moments() for space in spaces})
    values: dict[str, list[NDArray[np.float64]]] = {}
    features: dict[str, list[NDArray[np.float32]]] = {}
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        images, wanted = store.read_images(numbers), reference.read_images(numbers)
        for scorer in scorers:
            for name, array in scorer.take(images, wanted, numbers).items():
                values.setdefault(name, []).append(array)
        for space in spaces:
            extracted = space.extract(images)
            found.moments[space.name].update(extracted)
            if space.kept:
                features.setdefault(space.name, []).append(extracted.astype(np.float32))
        on_images(len(numbers))
    found.values = {name: np.concatenate(parts) for name, parts in values.items()}
    found.features = {name: np.concatenate(parts) for name, parts in features.items()}
    return found


def fidelity_scorer() -> ImageScorer:
    """PSNR and SSIM."""

    def take(images: Images, reference: Images, numbers: Sequence[int]) -> Values:
        found = compare_images(images, reference)
        return {"psnr": found.psnr, "ssim": found.ssim}

    return ImageScorer(("psnr", "ssim"), take)


def caption_scorer(prompts: PromptSet, contents: Sequence[Contents]) -> ImageScorer:
    """1 where the shipped classifier sees just what the caption says, else 0."""
    from sdq_deploy.shapes64.classifier import load_classifier, read_pairs

    classifier = load_classifier()
    assert len(contents) == len(prompts)

    def take(images: Images, reference: Images, numbers: Sequence[int]) -> Values:
        seen = read_pairs(images, classifier)
        right = [pairs == contents[number] for pairs, number in zip(seen, numbers, strict=True)]
        return {"caption_accuracy": np.asarray(right, np.float64)}

    return ImageScorer(("caption_accuracy",), take)


def classifier_space() -> FeatureSpace:
    """The shipped classifier's 256 penultimate features."""
    from sdq_deploy.shapes64.classifier import features, load_classifier

    classifier = load_classifier()
    return FeatureSpace("feature_fid", 256, lambda images: features(images, classifier), kept=True)
