"""What parity measured: a figure per step and its limit, for the manifest and for people."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from sdq_engines.errors import SdqError

__all__ = ["Criterion", "ParityReport"]


class Criterion(BaseModel):
    """One criterion's figures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """``float_graph``, ``sites``, ``quantized_graph``, ``engine:<name>``."""
    says: str
    """What was compared with what, in a line."""
    limit: float
    steps: tuple[int, ...]
    """The model calls looked at."""
    per_step: tuple[float, ...]
    """The figure at each of them; at most `limit` is wanted."""
    worst_at: str = ""
    """Where the worst figure was found, if it belongs to a layer."""
    details: dict[str, Any] = {}

    @property
    def worst(self) -> float:
        """The largest figure; NaN if there is one."""
        return next((figure for figure in self.per_step if math.isnan(figure)), max(self.per_step))

    @property
    def passed(self) -> bool:
        """Whether every step is within the limit (NaN is not)."""
        return all(figure <= self.limit for figure in self.per_step)


class ParityReport(BaseModel):
    """All criteria of one export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    criteria: tuple[Criterion, ...]

    @property
    def passed(self) -> bool:
        """Whether all are met."""
        return all(criterion.passed for criterion in self.criteria)

    def require(self, consequence: str = "nothing was written") -> None:
        """Raise if a criterion is not met.

        Args:
            consequence: what has become of the output.

        Raises:
            SdqError: naming the first one, its figure, its limit and the step.
        """
        for criterion in self.criteria:
            if not criterion.passed:
                step = criterion.steps[criterion.per_step.index(criterion.worst)]
                where = f", {criterion.worst_at}" if criterion.worst_at else ""
                raise SdqError(
                    f"Parity failed at step {step}{where}: {criterion.says} is {criterion.worst:.3g}, "
                    f"at most {criterion.limit:.3g} is wanted; {consequence}.",
                    "It would not make the trained model's images. Please report model, recipe and figures.",
                )

    def to_manifest(self) -> dict[str, Any]:
        """The figures for the manifest's fidelity section."""
        return {
            criterion.name: {
                **criterion.model_dump(mode="json", exclude={"name"}, exclude_defaults=True),
                "worst": criterion.worst,
            }
            for criterion in self.criteria
        }
