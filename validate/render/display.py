"""Checks as rows of text, the same in the terminal, in HTML and on the model card.

A cell with an interval reads ``13.42 (12.20 to 14.90)``; :func:`split_interval` takes it apart where two lines serve
better than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.printable import printable
from llmconvert.report.report import Check, Report
from llmconvert.report.section import Cell, Section

__all__ = [
    "Row",
    "TextTable",
    "format_bytes",
    "format_count",
    "format_runs",
    "format_seconds",
    "format_spacing",
    "format_value",
    "known_names",
    "label_of",
    "outcome",
    "printable_report",
    "rows",
    "section_table",
    "split_interval",
]

_LABELS: Mapping[str, str] = {
    "size_bytes": "Weights on disk",
    "bits_per_weight": "Bits per weight",
    "perplexity": "Perplexity",
    "perplexity.steps": "Perplexity step by step",
    "kl_mean": "KL divergence per token, mean",
    "kl_p99": "KL divergence per token, 99th percentile",
    "kl_p999": "KL divergence per token, 99.9th percentile",
    "top1_agreement": "Same most likely next token",
    "block_divergence": "Drift of the hidden state",
    "saturated_inputs": "Inputs beyond static scales, worst linear",
    "generation.agreement": "Same tokens in greedy continuations",
    "generation.looping": "Continuations stuck in a loop",
    "generation.ended": "Continuations that end by themselves",
    "speed.prefill": "Speed of reading a prompt",
    "speed.decode": "Speed of writing",
    "decoding.tokens_per_second": "Speed of writing with a long context",
    "inventory": "Tensors dropped or misshapen",
    "runtime": "Tensors the runtime could not load",
    "fidelity.max_abs_diff": "Largest difference of a logit, runtime to reader",
}
# These matter when they fail.
_QUIET = (
    "inventory",
    "runtime",
    "fidelity.max_abs_diff",
    "kl_p99",
    "kl_p999",
    "perplexity.steps",
    "generation.looping",
    "generation.ended",
)
_COUNTS = ("tensors", "texts", "tokens", "rounds")
_PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Row:
    """One check for people: label, original, artifact, change and limit as text; empty where there is none.

    ``note`` is the check's sentence, ``ok`` its verdict, ``gated`` whether a limit was set, ``quiet`` whether only the
    whole report shows it, ``measured`` whether it could be made.
    """

    name: str
    label: str
    reference: str
    value: str
    change: str
    limit: str
    note: str
    ok: bool
    gated: bool
    quiet: bool
    measured: bool


@dataclass(frozen=True, slots=True)
class TextTable:
    """A section's table as text; ``numeric`` says of each column whether it holds numbers."""

    headings: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


def rows(report: Report) -> list[Row]:
    """A row for every check, in the report's order."""
    return [
        Row(
            name=check.name,
            label=check.label or label_of(check.name),
            reference=_with_interval(check, check.reference, "reference_"),
            value=_with_interval(check, check.value, ""),
            change=_change(check),
            limit="" if check.limit is None else _limit(check),
            note=check.text,
            ok=check.ok,
            gated=check.limit is not None,
            quiet=check.ok and (check.quiet or check.name in _QUIET or not check.measured),
            measured=check.measured,
        )
        for check in report.checks
    ]


def printable_report(report: Report) -> Report:
    """The report with nothing in it that would command a terminal, whatever tensors, files and models are called."""
    return Report.model_validate(_printable(report.model_dump(by_alias=True)))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(found) for key, found in value.items()}
    return [_printable(found) for found in value] if isinstance(value, list | tuple) else value


def outcome(report: Report) -> str:
    """How the whole came out, in a few words: ``✓ passed all 12 checks``."""
    count, failed = len(report.checks) - len(report.unmeasured), len(report.failed)
    if failed:
        return f"✗ {failed} of {len(report.checks)} checks failed"
    if report.outcome == "passed":
        return f"✓ passed all {count} checks" if count > 1 else "✓ passed"
    of_files = f"; {count} check{'s' if count > 1 else ''} of files, speed and memory passed" if count else ""
    return f"– not measured: nothing here tells how well it predicts{of_files}"


def label_of(name: str) -> str:
    """A check's name in words."""
    return _LABELS.get(name, name)


def known_names() -> frozenset[str]:
    """The names of checks that every report may hold."""
    return frozenset(_LABELS)


def split_interval(cell: str) -> tuple[str, str]:
    """A cell's number, and its interval without parentheses (empty if it has none)."""
    number, _, interval = cell.partition(" (")
    return number, interval.removesuffix(")")


def format_value(value: float | None, unit: str) -> str:
    """A number with its unit, as many digits as mean something."""
    if value is None:
        return ""
    if unit == "bytes":
        return format_bytes(value)
    if unit in ("share", "relative"):
        return f"{100 * value:.1f} %"
    if unit == "seconds":
        return format_seconds(value)
    if unit in _COUNTS:
        return f"{value:,.0f}"
    if unit in ("tokens/s", "nats"):
        return f"{_significant(value, 3)} {unit}"
    return _significant(value, 4)


def section_table(section: Section) -> TextTable:
    """A section's table, every number with its column's unit."""
    columns = section.columns
    return TextTable(
        tuple(column.heading for column in columns),
        tuple(any(isinstance(row[index], float) for row in section.rows) for index in range(len(columns))),
        tuple(
            tuple(_cell(value, column.unit) for value, column in zip(row, columns, strict=True)) for row in section.rows
        ),
    )


def _cell(value: Cell, unit: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if not unit and float(value).is_integer() else format_value(value, unit)


def format_bytes(value: float) -> str:
    """Decimal units, three or four digits: ``112.8 MB``."""
    power = 0
    while abs(value) >= 999.95 and power < len(_PREFIXES) - 1:
        value /= 1000
        power += 1
    return f"{value:.0f} {_PREFIXES[power]}" if power == 0 else f"{value:.1f} {_PREFIXES[power]}"


def format_runs(numbers: Iterable[int]) -> list[str]:
    """Whole numbers, neighbours together: ``0–4`` and ``7`` for 0, 1, 2, 3, 4 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def format_count(value: float) -> str:
    """``134.5 M``, ``6.7 B``: numbers in a model."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {letter}"
    return f"{value:.0f}"


def format_seconds(value: float) -> str:
    """``180 ms``, ``8.4 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if value < 0.95:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_spacing(about: Mapping[str, Any]) -> str:
    """How a text's windows lie to each other, to follow "windows of 512 tokens"; ``about`` is perplexity's detail."""
    stride = about.get("stride", about["window"])
    return " without overlap" if stride >= about["window"] else f", {stride:,} apart, each prediction scored once"


def _significant(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}" if decimals <= digits + 3 else f"{value:.{digits - 1}e}"


def _with_interval(check: Check, value: float | None, prefix: str) -> str:
    text = format_value(value, check.unit)
    low, high = check.detail.get(f"{prefix}low"), check.detail.get(f"{prefix}high")
    if value is None or low is None or high is None:
        return text
    return f"{text} ({_significant(low, 4)} to {_significant(high, 4)})"


def _change(check: Check) -> str:
    if check.name == "perplexity" and check.detail.get("increase") is not None:
        text = _signed(check.detail["increase"])
        low, high = check.detail.get("increase_low"), check.detail.get("increase_high")
        return text if low is None or high is None else f"{text} ({_signed(low)} to {_signed(high)})"
    if not check.value or not check.reference or check.unit in _COUNTS:
        return ""
    return _signed(check.value / check.reference - 1)


def _signed(share: float) -> str:
    percent = f"{100 * share:+.1f}"
    return percent.replace("-", "\N{MINUS SIGN}") + " %"


def _limit(check: Check) -> str:
    # Agreement has to reach its limit, everything else has to stay below.
    sign = "≥" if check.unit == "share" else "≤"
    return f"{sign} {format_value(check.limit, check.unit)}"
