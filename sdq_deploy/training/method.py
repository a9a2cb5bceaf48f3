"""What the rest of a training asks of its method. One file a method; each exports one object of this type.

How to add one: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from sdq_deploy.recipes.schema import Fit, Method, Recipe
from sdq_export.quantspec import QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["Stage", "TrainingMethod"]

Context = TypeVar("Context")
"""What the stages of a training share; it knows its method, so the method does not know its type."""


@dataclass(frozen=True)
class Stage(Generic[Context]):
    """One stage.

    Attributes:
        name: as shown and recorded.
        run: does the work; called with the hash of the stage's inputs. Figures that it returns go into run.json.
        inputs: what the result depends on, beside the stages in `after`; JSON values.
        after: stages whose results this one reads.
        everywhere: whether all processes work on it; otherwise the main one, while the others wait.
    """

    name: str
    run: Callable[[Context, str], dict[str, Any] | None]
    inputs: Callable[[Context], Any]
    after: tuple[str, ...] = ()
    everywhere: bool = False


def _nothing(recipe: Recipe, processes: int) -> None:
    """Every recipe fits."""


def _no_fit(recipe: Recipe) -> Fit | None:
    return None


def _no_parameters(denoiser: StepDenoiser, spec: QuantSpec, recipe: Recipe) -> list[nn.Parameter]:
    return []


@dataclass(frozen=True)
class TrainingMethod(Generic[Context]):
    """How integers and scales are found, once the serial dataset is collected and calibrated.

    Attributes:
        name: in recipes and in `--method`.
        fit: the stage that finds them.
        groups: scale groups of the activations, 0 for one a step.
        smooths: whether calibration tries the recipe's smoothing strengths.
        uses_sensitivity: whether the stage sensitivity comes before, and its layers count in the fit.
        check: refuses what the method cannot do, given the number of processes, before any work is done.
        loop: the section of the training loop as the method runs it; None where it runs no such loop.
        learning: parameters that the loop's optimizer has beside those that the student always has, reckoned from
            shapes; asked only where there is a loop.
        learns_student: whether the student's own weights learn.
    """

    name: Method
    fit: Stage[Context]
    groups: Callable[[Recipe], int]
    smooths: Callable[[Recipe], bool] = lambda recipe: False
    uses_sensitivity: bool = False
    check: Callable[[Recipe, int], None] = _nothing
    loop: Callable[[Recipe], Fit | None] = _no_fit
    learning: Callable[[StepDenoiser, QuantSpec, Recipe], list[nn.Parameter]] = _no_parameters
    learns_student: bool = False

    def sensitive_layers(self, recipe: Recipe, spec: QuantSpec) -> int:
        """How many layers the fit treats as sensitive."""
        return min(recipe.sensitivity.top_k, len(spec.weights)) if self.uses_sensitivity else 0
