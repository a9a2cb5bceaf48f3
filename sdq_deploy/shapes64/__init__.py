"""shapes-64: a small, real text-to-image latent diffusion model of captioned shapes, 64x64 pixels.

It is what the demo quantizes and what the tests measure on. Scenes, captions and splits need numpy and Pillow alone;
`sdq_deploy.shapes64.classifier` needs torch, and `sdq_deploy.shapes64.train` the `train` extra.
"""

from __future__ import annotations

from sdq_deploy.shapes64.paths import classifier_path, model_path
from sdq_deploy.shapes64.render import render
from sdq_deploy.shapes64.scenes import Scene, sample_scene
from sdq_deploy.shapes64.splits import (
    CaptionSeed,
    calibration_prompts,
    held_out_pairs,
    validation_pairs,
    validation_prompts,
)

__all__ = [
    "CaptionSeed",
    "Scene",
    "calibration_prompts",
    "classifier_path",
    "held_out_pairs",
    "model_path",
    "render",
    "sample_scene",
    "validation_pairs",
    "validation_prompts",
]
