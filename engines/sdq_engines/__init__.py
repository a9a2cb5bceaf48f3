"""Run quantized Stable Diffusion packages: no torch, no diffusers, one engine loaded when asked.

    from sdq_engines import Pipeline
    pipe = Pipeline.load("package", engine="auto")
    images = pipe("a red circle on a blue background", seed=7, guidance_scale=5.0).images

Importing this module loads nothing heavy; names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdq_engines.errors import SdqError
    from sdq_engines.runtime.pipeline import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput", "SdqError"]

_HOMES = {
    "Pipeline": "sdq_engines.runtime.pipeline",
    "PipelineOutput": "sdq_engines.runtime.pipeline",
    "SdqError": "sdq_engines.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
