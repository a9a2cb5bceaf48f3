"""Figures as people read them, for the terminal and the page alike."""

from __future__ import annotations

from rich.table import Table

from sdq_deploy.evaluation.catalogue import FRECHET_METRICS, IMAGE_METRICS, Metric
from sdq_deploy.evaluation.results import CandidateResult, Comparison, EvaluationResults, Figure
from sdq_deploy.tables import new_table

__all__ = ["comparison_table", "difference", "figure_table", "figures_shown", "interval", "metric_of", "value"]


def metric_of(name: str) -> Metric:
    """The metric of this name."""
    return IMAGE_METRICS[name] if name in IMAGE_METRICS else FRECHET_METRICS[name]


def figures_shown(results: EvaluationResults) -> list[str]:
    """Metrics that any row has, in the catalogue's order."""
    rows = (results.reference, *results.candidates)
    return [name for name in (*IMAGE_METRICS, *FRECHET_METRICS) if any(name in row.figures for row in rows)]


def value(figure: Figure | None, name: str) -> str:
    """The figure with its unit, "–" where there is none."""
    return "–" if figure is None else _number(figure.value, name) + metric_of(name).unit


def interval(figure: Figure | Comparison | None, name: str) -> str:
    """The 95 % interval without a unit; empty where there is none."""
    if figure is None or figure.low is None or figure.high is None:
        return ""
    return f"{_number(figure.low, name)} to {_number(figure.high, name)}"


def difference(comparison: Comparison) -> str:
    """A paired difference with its sign; of shares in percentage points."""
    metric = metric_of(comparison.figure)
    unit = " points" if metric.percent else metric.unit
    return f"{_number(comparison.value, comparison.figure, sign=True)}{unit}"


def _number(value: float, name: str, sign: bool = False) -> str:
    metric = metric_of(name)
    shown = 100 * value if metric.percent else value
    return f"{shown:{'+' if sign else ''}.{metric.digits}f}"


def figure_table(results: EvaluationResults) -> Table:
    """One row a candidate, each figure with its interval beneath."""
    count = results.prompts.count
    names = figures_shown(results)
    title = f"Against {results.reference.path}, {count} images of {results.prompts.title}"
    table = new_table(title, [""], [metric_of(name).title for name in names])
    for row in (*results.candidates, results.reference):
        table.add_row(row.name, *(_cell(row, name) for name in names))
    return table


def _cell(row: CandidateResult, name: str) -> str:
    figure = row.figures.get(name)
    beneath = interval(figure, name)
    return value(figure, name) + (f"\n[dim]{beneath}[/]" if beneath else "")


def comparison_table(results: EvaluationResults) -> Table:
    """Paired differences with their intervals."""
    table = new_table("Paired differences, image by image", ["difference", "figure"], ["mean", "95 % interval"])
    for found in results.comparisons:
        table.add_row(
            f"{found.first} − {found.second}",
            metric_of(found.figure).title,
            difference(found),
            interval(found, found.figure),
        )
    return table
