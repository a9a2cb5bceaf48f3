"""What parity measured: a figure per step and its limit, for the manifest and for people."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

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
    chance: tuple[float, ...] = ()
    """How much of each step's figure the few samples alone may make; forgiven step by step, not overall."""
    overall: float | None = None
    """The figure over all steps and samples together, for criteria that are averages."""
    overall_chance: float = 0.0
    """How much of it the few samples alone may make; forgiven."""
    worst_at: str = ""
    """Where the worst figure was found, if it belongs to a layer."""
    details: dict[str, Any] = {}
    hint: str = Field(
        default="It would not make the trained model's images. Please report model, recipe and figures.",
        exclude=True,
        repr=False,
    )
    """What to do if it is not met."""
    reference_by_sample: tuple[tuple[float, ...], ...] = Field(default=(), exclude=True, repr=False)
    """The reference's distance from the teacher by step and sample, for the engines' turn; not in the manifest."""

    @property
    def worst(self) -> float:
        """The largest figure; NaN if there is one."""
        return next((figure for figure in self.per_step if math.isnan(figure)), max(self.per_step))

    @property
    def failing(self) -> int | None:
        """Position of the worst figure that is past the limit; None where none is. NaN is past it."""
        chance = self.chance or (0.0,) * len(self.per_step)
        beyond = [at for at, figure in enumerate(self.per_step) if not figure - chance[at] <= self.limit]
        return max(beyond, key=lambda at: (math.isnan(self.per_step[at]), self.per_step[at]), default=None)

    @property
    def passed(self) -> bool:
        """Whether every step, and the whole, is within the limit."""
        return self.failing is None and (self.overall is None or self.overall - self.overall_chance <= self.limit)


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
            if criterion.passed:
                continue
            at = criterion.failing
            where, figure = "over all steps", criterion.overall
            if at is not None:
                where, figure = f"at step {criterion.steps[at]}", criterion.per_step[at]
                where += f", {criterion.worst_at}" if criterion.worst_at else ""
            raise SdqError(
                f"Parity failed {where}: {criterion.says} is {figure:.3g}, "
                f"at most {criterion.limit:.3g} is wanted; {consequence}.",
                criterion.hint,
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
