"""The table that a run ends with: what was gained, what it cost, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmconvert.validate.display import rows, split_interval
from llmconvert.validate.report import Report

__all__ = ["render_terminal"]

# Rows that only matter when they fail; the report files hold them all.
_QUIET = (
    "inventory",
    "runtime",
    "fidelity.max_abs_diff",
    "kl_p99",
    "generation.looping",
    "generation.ended",
    "speed.prefill",
    "speed.decode",
)


def render_terminal(report: Report, console: Console, *, locations: Mapping[str, str] | None = None) -> None:
    """Print the closing table.

    Args:
        locations: what lies where, in the order to print: ``{"artifact": "out/demo", …}``.
    """
    table = Table(title=escape(f"{report.model.source} → {report.model.name}"), title_justify="left")
    table.add_column("")
    for heading in ("original", "artifact", "change", "limit"):
        table.add_column(heading, justify="right")
    for row in rows(report):
        if row.name in _QUIET and row.ok:
            continue
        style = "" if row.ok else "bold red"
        label = Text(row.label if row.ok else f"{row.label} ✗", style=style)
        table.add_row(label, *(_cell(cell, style) for cell in (row.reference, row.value, row.change, row.limit)))
    console.print(table)
    for check in report.failed:
        console.print(Text(f"✗ {check.name}: {check.text or 'over its limit'}", style="bold red"))
    if report.verdict:
        count = len(report.checks)
        console.print(Text(f"✓ passed all {count} checks", style="green"))
    for what, where in (locations or {}).items():
        console.print(Text.assemble((f"{what:<12}", "dim"), where), soft_wrap=True)


def _cell(text: str, style: str) -> Text:
    """A number, with its interval on a second line."""
    number, interval = split_interval(text)
    cell = Text(number, style=style)
    return cell.append(f"\n{interval}", style="dim") if interval else cell
