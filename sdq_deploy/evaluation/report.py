"""report.html: tables, plots and a pager of images, in one file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from sdq_deploy.evaluation.cases import choose_cases, describe_cases
from sdq_deploy.evaluation.plots import Series, line_plot
from sdq_deploy.evaluation.results import Comparison, EvaluationResults
from sdq_deploy.evaluation.scoring import Scores
from sdq_deploy.evaluation.settings import EvaluationSettings
from sdq_deploy.evaluation.tables import difference, figures_shown, interval, metric_of, value
from sdq_deploy.pages.render import render_page
from sdq_engines.files import atomic_write_text

__all__ = ["write_page"]

#: Images of each candidate inside the page.
_CASES = 48
_CURVE_POINTS = 101


def write_page(settings: EvaluationSettings, results: EvaluationResults, scores: Mapping[str, Scores]) -> Path:
    """Write report.html and return its path."""
    names = [candidate.name for candidate in results.candidates]
    psnr = {name: scores[name].values["psnr"] for name in names}
    stores = {candidate.name: settings.store(candidate) for candidate in (settings.reference, *settings.candidates)}
    cases = describe_cases(choose_cases(psnr, _CASES), settings.prompts, stores, scores)
    shown = figures_shown(results)
    context: dict[str, Any] = {
        "results": results,
        "names": names,
        "figures": shown,
        "compared": [name for name in shown if any(found.figure == name for found in results.comparisons)],
        "pairs": _pairs(results),
        "error_plot": Markup(_error_plot(results)),
        "psnr_plot": Markup(_psnr_plot(psnr)),
        "cases": Markup(_script_json(cases)),
        "num_cases": len(cases),
        "scaled_down": max(settings.reference.image_size) > 256,
    }
    filters = {"value": value, "interval": interval, "difference": difference, "metric": metric_of, "worst": _worst}
    page = render_page("sdq_deploy.evaluation", "report.html.j2", context, filters)
    atomic_write_text(settings.out / "report.html", page)
    return settings.out / "report.html"


def _pairs(results: EvaluationResults) -> dict[tuple[str, str], dict[str, Comparison]]:
    """(first, second) -> figure -> difference: a row of the table each."""
    rows: dict[tuple[str, str], dict[str, Comparison]] = {}
    for found in results.comparisons:
        rows.setdefault((found.first, found.second), {})[found.figure] = found
    return rows


def _worst(figure: Any, name: str) -> str:
    if figure is None or figure.worst is None:
        return ""
    metric = metric_of(name)
    return f"worst {figure.worst:.{metric.digits}f}{metric.unit}"


def _error_plot(results: EvaluationResults) -> str:
    series = [
        Series(
            candidate.name,
            [error.step + 1 for error in candidate.latent_errors],
            [error.value for error in candidate.latent_errors],
            [error.low for error in candidate.latent_errors],
            [error.high for error in candidate.latent_errors],
        )
        for candidate in results.candidates
        if candidate.latent_errors
    ]
    return line_plot(series, "step", "relative latent error", logarithmic=True)


def _psnr_plot(psnr: Mapping[str, np.ndarray]) -> str:
    """Share of images at least as good, by PSNR: a mean hides images that came out as another drawing."""
    low = min(values.min() for values in psnr.values())
    high = max(values.max() for values in psnr.values())
    at = np.linspace(low, high, _CURVE_POINTS)
    series = [
        Series(name, at.tolist(), [100 * float((values >= limit).mean()) for limit in at])
        for name, values in psnr.items()
    ]
    return line_plot(series, "PSNR, dB", "% of images at least as good")


def _script_json(data: Any) -> str:
    # "</script>" or "<!--" in a prompt would end the element.
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
