"""Tables that commands print at their end: reports, batches, comparisons."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmconvert.printable import printable
from llmconvert.recipes.batch.outcome import Outcome
from llmconvert.recipes.runner import RunResult
from llmconvert.recipes.sweep.result import SweepResult
from llmconvert.report.report import Report
from llmconvert.validate.render.comparison import ReportComparison, render_comparison_table
from llmconvert.validate.render.display import format_bytes, format_seconds
from llmconvert.validate.render.pareto import knee, measure_of, points
from llmconvert.validate.render.terminal import render_terminal

__all__ = ["batch_values", "print_batch", "print_comparison", "print_report"]

# Where neither a terminal nor COLUMNS says how wide it is: what every line of text here fits.
_WIDTH = 80
# Runs whose whole tables are shown; of more, their reports have them.
_WHOLE = 3


def print_comparison(comparison: ReportComparison) -> None:
    """Several reports' table on standard output."""
    render_comparison_table(comparison, _console())


def print_report(report: Report) -> None:
    """A report's table on standard output."""
    render_terminal(report, _console())


def batch_values(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """How each recipe ended, as JSON values: its report and where everything lies, or its error."""
    found: list[dict[str, Any]] = []
    for outcome in outcomes:
        said: dict[str, Any] = {"recipe": outcome.recipe, "seconds": round(outcome.seconds, 3)}
        said |= {"exit_code": outcome.exit_code, "error": outcome.error or None}
        if outcome.result is not None:
            result = outcome.result
            said |= {"artifact": str(result.artifact), "published": result.published}
            said["report"] = result.report.model_dump(mode="json")
        found.append(said)
    return found


def print_batch(outcomes: Sequence[Outcome]) -> None:
    """Every run's own table, of a few, or one line of each variant of a sweep; and how each of several ended."""
    console = _console()
    for sweep in {id(one.sweep): one.sweep for one in outcomes if one.sweep is not None}.values():
        _print_sweep(sweep, console)
    for outcome in outcomes if len(outcomes) <= _WHOLE else ():
        if outcome.result is not None and outcome.sweep is None:
            render_terminal(outcome.result.report, console, locations=_locations(outcome.result))
    if len(outcomes) == 1:
        return
    table = Table(title="Recipes", title_justify="left")
    for heading in ("recipe", "time", "result", "where"):
        table.add_column(heading, overflow="fold")
    for outcome in (one for one in outcomes if not one.left_out):
        verdict, where = Text(f"failed ({outcome.exit_code})", "red"), outcome.error
        if outcome.result is not None:
            told = outcome.result.report.outcome == "passed"
            verdict = Text("done", "green") if told else Text("done, not measured", "yellow")
            where = outcome.result.published or str(outcome.result.artifact)
        table.add_row(Text(printable(outcome.recipe)), format_seconds(outcome.seconds), verdict, Text(printable(where)))
    console.print(table)


def _print_sweep(swept: SweepResult, console: Console) -> None:
    table = Table(title=printable(swept.sweep.name), title_justify="left")
    for heading in ("variant", "size", "bits", "perplexity", "KL", ""):
        table.add_column(heading, overflow="fold", justify="left" if heading in ("variant", "") else "right")
    bend = knee(points(swept.reports, measure_of(swept.reports)))
    left_out = swept.left_out
    for variant in swept.sweep.variants:
        name, report = variant.name, swept.reports.get(variant.name)
        cells = {check.name: check for check in report.checks} if report is not None else {}
        notes = ["taken"] if name == swept.picked else []
        notes += ["knee"] if bend is not None and bend.name == name else []
        notes += ["left out" if name in left_out else "failed"] if name in swept.failures else []
        shown = ((check, cells.get(check)) for check in ("size_bytes", "bits_per_weight", "perplexity", "kl_mean"))
        values = [_short(check, found.value) if found is not None else "" for check, found in shown]
        table.add_row(Text(printable(name)), *values, Text(", ".join(notes)))
    console.print(table)
    for line in swept.left_out_lines:
        console.print(Text(printable(f"left out: {line}")))
    if swept.page is not None:
        console.print(Text(f"side by side: {swept.page}"), soft_wrap=True)


def _short(check: str, value: float | None) -> str:
    if value is None:
        return ""
    return format_bytes(value) if check == "size_bytes" else f"{value:.4f}" if check == "kl_mean" else f"{value:.2f}"


def _locations(result: RunResult) -> dict[str, str]:
    artifact = result.artifact
    if result.published is not None and result.published.startswith("file:"):
        artifact = type(artifact)(result.published.removeprefix("file:"))
    found = {"artifact": str(artifact), "model card": str(artifact / "README.md")}
    found["report"] = str(artifact / "llmconvert" / "report.html")
    if result.published is not None and not result.published.startswith("file:"):
        found["published"] = result.published
    return found


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH)
