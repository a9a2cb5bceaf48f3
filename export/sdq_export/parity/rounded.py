"""What integer weights of a text encoder or the VAE cost, against the unrounded FP32 component.

That the stored graph equals torch with the rounded weights is `parity.components`. Limits: docs/quantization.md,
"Parity".
"""

from __future__ import annotations

from torch import Tensor, nn

from sdq_export.families.component import ComponentExport
from sdq_export.parity.report import Criterion
from sdq_export.source import Source
from sdq_export.storage import IntegerDtype

__all__ = ["check_rounding"]


def check_rounding(
    source: Source, export: ComponentExport, rounded: nn.Module, given: Tensor, dtype: IntegerDtype
) -> Criterion:
    """The error of a component's rounded weights, as its family measures it.

    Args:
        source: has the unrounded ones.
        export: which component it is.
        rounded: its module, of the rounded weights.
        given: token ids int64 [n, L], the empty prompt's first, and at least one more; or latents [n, C, h, w].
        dtype: how it was rounded.
    """
    cost = export.rounding
    error, details = cost.measure(rounded, export.module(source.part(export.part)), given)
    return Criterion(
        name=f"{export.name}_{dtype}",
        says=cost.says.format(weights=f"the {export.words}'s {dtype.upper()} weights"),
        limit=cost.limit,
        steps=(0,),
        per_step=(error,),
        details=details,
        hint=_hint(cost.option, dtype),
    )


def _hint(option: str, dtype: IntegerDtype) -> str:
    better = f"{option} int8, or leave it out for FP16" if dtype == "int4" else f"leave {option} out"
    return f"Keep more of it: {better}."
