"""The table that a run ends with: what was gained, what it cost, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmconvert.report.report import Report
from llmconvert.report.section import Section
from llmconvert.validate.render.display import label_of, outcome, printable_report, rows, section_table, split_interval

__all__ = ["render_terminal"]

_STYLES = {"passed": "green", "failed": "bold red", "not measured": "yellow"}
# Speeds hold for one machine; the report files have them.
_SPEED = "speed."
# Columns below which the table does without its frame, so that numbers stay whole beside what they are of.
_NARROW = 100


def render_terminal(report: Report, console: Console, *, locations: Mapping[str, str] | None = None) -> None:
    """Print the closing table.

    Args:
        locations: what lies where, in the order to print: ``{"artifact": "out/demo", …}``.
    """
    report = printable_report(report)
    narrow = console.width < _NARROW
    table = Table(
        title=escape(f"{report.model.source} → {report.model.name}"),
        title_justify="left",
        box=box.SIMPLE if narrow else box.HEAVY_HEAD,
        padding=(0, 1, 0, 0) if narrow else (0, 1),
    )
    table.add_column("", overflow="fold")
    for heading in ("original", "artifact", "change", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(report):
        if row.quiet or (row.name.startswith(_SPEED) and row.ok):
            continue
        style = "" if row.ok else "bold red"
        label = Text(row.label if row.ok else f"{row.label} ✗", style=style)
        table.add_row(label, *(_cell(cell, style) for cell in (row.reference, row.value, row.change, row.limit)))
    console.print(table)
    for section in report.sections:
        if "terminal" not in section.shown or not (section.rows or section.text):
            continue
        console.print(_section_table(section) if section.rows else Text(section.title, style="italic"))
        if section.text:
            console.print(Text(section.text, style="dim"))
    for check in report.failed:
        console.print(Text(f"✗ {check.name}: {check.text or 'over its limit'}", style="bold red"))
    for check in report.unmeasured:
        if check.ok:
            console.print(Text(f"– {check.label or label_of(check.name)}: {check.text}", style="yellow"))
    console.print(Text(outcome(report), style=_STYLES[report.outcome]))
    for what, where in (locations or {}).items():
        console.print(Text.assemble((f"{what:<12}", "dim"), where), soft_wrap=True)


def _section_table(section: Section) -> Table:
    table = Table(title=Text(section.title), title_justify="left")
    found = section_table(section)
    for heading, numeric in zip(found.headings, found.numeric, strict=True):
        table.add_column(Text(heading), justify="right" if numeric else "left", overflow="fold")
    for row in found.rows:
        table.add_row(*map(Text, row))
    return table


def _cell(text: str, style: str) -> Text:
    """A number, with its interval on a second line."""
    number, interval = split_interval(text)
    cell = Text(number, style=style)
    return cell.append(f"\n{interval}", style="dim") if interval else cell
