"""Which engine may compute which precision, and on which NVIDIA architectures: read from the number formats."""

from __future__ import annotations

from collections.abc import Sequence

from sdq_engines.errors import SdqError
from sdq_engines.formats import PRECISIONS, NumberFormat

__all__ = ["PORTABLE_SM", "least_sm", "refusal", "require_architectures", "require_engine"]

#: The oldest architecture that a TensorRT-RTX engine is built for unless an older one is named. For sm_75 its builder
#: (1.7.1) has no INT8 convolution, and leaves it out itself where no architecture is named.
PORTABLE_SM = 80


def _formats(precision: str) -> tuple[NumberFormat, ...]:
    """Of a package's precision; none for one in floating point."""
    return PRECISIONS[precision].formats if precision in PRECISIONS else ()


def refusal(engine: str, precision: str) -> str | None:
    """Why an engine cannot compute a precision, as the end of a sentence; None if it can."""
    return next((each.refused_by[engine] for each in _formats(precision) if engine in each.refused_by), None)


def require_engine(engine: str, precision: str) -> None:
    """Raises: SdqError: the engine cannot compute this precision."""
    if reason := refusal(engine, precision):
        title = next(each.title for each in _formats(precision) if engine in each.refused_by)
        raise SdqError(
            f"The engine {engine} cannot be built for a package of precision {precision} ({title}): {reason}.",
            "Build it with --engine onnxruntime or --engine tensorrt-rtx, or train with another --precision.",
        )


def least_sm(precision: str) -> int:
    """The oldest NVIDIA architecture that multiplies all formats of a package's precision, e.g. 89."""
    return max((each.least_sm for each in _formats(precision)), default=0)


def require_architectures(engine: str, precision: str, wanted: Sequence[int]) -> None:
    """Raises: SdqError: one of these NVIDIA architectures has no kernels for this precision."""
    least = least_sm(precision)
    for sm in wanted:
        if sm < least:
            title = next(each.title for each in _formats(precision) if each.least_sm == least)
            raise SdqError(
                f"{engine} cannot build a package of precision {precision} for sm_{sm}: {title} needs sm_{least} or "
                "newer.",
                f"Name newer ones (--sm {least}), or train with another --precision for that GPU.",
            )
