"""The course of an export: one bar a stage, the table of parity, a line for each engine."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from sdq_deploy.display.consoles import new_progress, new_status, status_console
from sdq_deploy.display.progress import Status
from sdq_engines.package.schema import EngineEntry
from sdq_export.jobs import ExportListener
from sdq_export.parity import Criterion, ParityReport
from sdq_export.writer import ExportResult

__all__ = ["ExportDisplay"]


class ExportDisplay(ExportListener):
    """Shows an export on standard error; a context, at whose end nothing moves any more.

    Args:
        results: where the engines' lines are printed; None prints neither these nor the table of parity.
    """

    def __init__(self, results: Console | None = status_console) -> None:
        self.results = results
        self._shown = ExitStack()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._status: Status | None = None

    def __enter__(self) -> ExportDisplay:
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.close()

    def stage(self, name: str, done: int, total: int) -> None:
        """One bar a stage; a stage that cannot be counted pulses."""
        if self._progress is None:
            self._progress = self._shown.enter_context(new_progress())
        if name not in self._tasks:
            self._end_bars()
            self._tasks[name] = self._progress.add_task(name, total=total or None)
        self._progress.update(self._tasks[name], completed=done)

    def notice(self, sentence: str) -> None:
        """A line."""
        status_console.print(sentence, markup=False, soft_wrap=True)

    def exported(self, result: ExportResult) -> None:
        """All bars end."""
        self._end_bars()
        self._shown.close()
        if self.results is not None:
            _print_parity(result.report)

    def building(self, engine: str, what: str) -> None:
        """Beside a spinner."""
        if self._status is None:
            self._status = self._shown.enter_context(new_status(f"{engine}: {what}"))
        else:
            self._status.update(f"{engine}: {what}")

    def built(self, engine: str, entry: EngineEntry, criterion: Criterion | None) -> None:
        """A line."""
        self._shown.close()
        self._status = None
        if self.results is None:
            return
        proof = "parity not measured: it does not run here"
        if criterion is not None:
            proof = f"parity {criterion.overall:.3f} (at most {criterion.limit})"
        line = f"{engine}  {entry.version}, built in {entry.build_seconds:.1f} s, {proof}"
        self.results.print(line, soft_wrap=True)

    def _end_bars(self) -> None:
        if self._progress is None:
            return
        for task in self._tasks.values():
            total = self._progress.tasks[task].total or 1
            self._progress.update(task, total=total, completed=total)


def _print_parity(report: ParityReport) -> None:
    """One line a criterion: its figure over all steps, its worst step, and the limit."""
    table = Table("parity", "overall", "worst step", "limit", "steps", "worst at", box=None, pad_edge=False)
    for criterion in report.criteria:
        mean = sum(criterion.per_step) / len(criterion.per_step)
        table.add_row(
            criterion.name,
            f"{mean if criterion.overall is None else criterion.overall:.3g}",
            f"{criterion.worst:.3g}",
            f"{criterion.limit:.3g}",
            str(len(criterion.steps)),
            criterion.worst_at,
        )
    status_console.print(table)
