"""What a call takes where the caller names nothing is what diffusers' pipelines take, in every family."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

from sdq_export.families import FAMILIES
from sdq_export.families.base import Family


def default(pipeline: str, argument: str) -> Any:
    return inspect.signature(getattr(diffusers, pipeline).__call__).parameters[argument].default


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_defaults_are_those_of_the_pipelines(family: type[Family]) -> None:
    stem = family.pipeline.removesuffix("Pipeline")
    assert family.call_defaults.image_strength == default(f"{stem}Img2ImgPipeline", "strength")
    assert family.call_defaults.inpaint_strength == default(f"{stem}InpaintPipeline", "strength")
    assert family.default_steps == default(family.pipeline, "num_inference_steps")
    assert family.default_guidance == default(family.pipeline, "guidance_scale")
    if family.inpainting_pipeline:
        wanted = default(family.inpainting_pipeline, "guidance_scale")
        assert (family.inpainting_guidance or family.default_guidance) == wanted
