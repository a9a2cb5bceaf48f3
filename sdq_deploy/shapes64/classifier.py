"""The caption classifier: which (kind, colour) pairs a 64x64 picture shows, for measuring text alignment.

A small CNN with one logit per pair and place; a pair is there when its logit is positive anywhere. Its penultimate
features serve a feature-FID. It reads softened, generated pictures as well as drawn ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn

from sdq_deploy.shapes64.paths import classifier_path
from sdq_deploy.shapes64.scenes import COLOURS, KINDS, Scene

__all__ = ["PAIRS", "CaptionClassifier", "caption_accuracy", "features", "load_classifier", "read_pairs"]

#: What each of the 40 logits stands for.
PAIRS: tuple[tuple[str, str], ...] = tuple((kind, colour) for kind in KINDS for colour in COLOURS)

_BATCH = 256


class CaptionClassifier(nn.Module):
    """float32 [N, 3, 64, 64] in -1..1 to logits [N, 40]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _block(3, 24, stride=2),
            _block(24, 48, stride=2),
            _block(48, 64),
            _block(64, 96, stride=2),
            _block(96, 96),
            nn.Conv2d(96, 128, 1),
            nn.SiLU(),
        )
        self.head = nn.Conv2d(128, len(PAIRS), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.trunk(images))
        return logits.amax(dim=(2, 3))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 256]: the mean and the maximum over places of the trunk's 128 channels."""
        places = self.trunk(images)
        return torch.cat([places.mean(dim=(2, 3)), places.amax(dim=(2, 3))], dim=1)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


def load_classifier(path: Path | None = None) -> CaptionClassifier:
    """The shipped classifier (stored in FP16), in FP32 and evaluation mode."""
    classifier = CaptionClassifier()
    classifier.load_state_dict({key: value.float() for key, value in load_file(path or classifier_path()).items()})
    return classifier.eval()


def caption_accuracy(
    images: npt.NDArray[np.uint8], scenes: Sequence[Scene], classifier: CaptionClassifier | None = None
) -> npt.NDArray[np.bool_]:
    """For each picture, uint8 [N, 64, 64, 3], whether it shows the scene's shapes in their colours and no others."""
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes")
    found = read_pairs(images, classifier)
    return np.asarray([pairs == scene.contents for pairs, scene in zip(found, scenes, strict=True)], dtype=np.bool_)


def read_pairs(
    images: npt.NDArray[np.uint8], classifier: CaptionClassifier | None = None
) -> list[frozenset[tuple[str, str]]]:
    """The (kind, colour) pairs seen in each picture, uint8 [N, 64, 64, 3]."""
    model = classifier or load_classifier()
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in _batches(images)])
    return [frozenset(PAIRS[i] for i in row.nonzero()[:, 0].tolist()) for row in logits > 0]


def features(images: npt.NDArray[np.uint8], classifier: CaptionClassifier | None = None) -> npt.NDArray[np.float32]:
    """Penultimate features of pictures, uint8 [N, 64, 64, 3], as float32 [N, 256]."""
    model = classifier or load_classifier()
    with torch.no_grad():
        return torch.cat([model.features(batch) for batch in _batches(images)]).numpy()


def _batches(images: npt.NDArray[np.uint8]) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH]))
        yield batch.permute(0, 3, 1, 2).float() / 127.5 - 1.0
