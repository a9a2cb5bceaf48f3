"""`--fail-below psnr=30,ssim=0.95`: limits that a candidate's means must not fall under."""

from __future__ import annotations

from collections.abc import Mapping

from sdq_deploy.evaluation.catalogue import IMAGE_METRICS
from sdq_deploy.evaluation.results import EvaluationResults
from sdq_engines.errors import SdqError

__all__ = ["check_measured", "failures", "parse_limits"]

#: Figures of which more is better; "below" means nothing for the others.
LIMITED = tuple(name for name, metric in IMAGE_METRICS.items() if metric.higher_is_better)


def parse_limits(text: str | None) -> dict[str, float]:
    """`psnr=30,ssim=0.95` as a mapping; empty for None.

    Raises:
        SdqError: an unknown figure, or no number.
    """
    limits: dict[str, float] = {}
    for part in (text or "").split(","):
        name, found, value = (piece.strip() for piece in part.partition("="))
        if not name and not found:
            continue
        if name not in LIMITED:
            raise SdqError(f"--fail-below knows no figure {name!r}.", f"It takes: {', '.join(LIMITED)}.")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise SdqError(
                f"--fail-below wants a number for {name}; {value!r} is none.", "For example --fail-below psnr=30"
            ) from error
    if text is not None and not limits:
        raise SdqError("--fail-below names no figure.", "For example --fail-below psnr=30,ssim=0.95")
    return limits


def check_measured(limits: Mapping[str, float], measured: list[str]) -> None:
    """Raises: SdqError: a limited figure will not be measured; said before any image is made."""
    for name in limits:
        if name not in measured:
            raise SdqError(
                f"--fail-below limits {name}, which is not measured here.", f"Measured are: {', '.join(measured)}."
            )


def failures(results: EvaluationResults, limits: Mapping[str, float]) -> list[str]:
    """What fell below, in words; empty if nothing did."""
    found = []
    for candidate in results.candidates:
        for name, limit in limits.items():
            value = candidate.figures[name].value
            # "not >=" so that NaN fails.
            if not value >= limit:
                found.append(f"{candidate.name}: {name} is {value:.4f}, below {limit:g}")
    return found
