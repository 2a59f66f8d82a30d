"""Several artifacts held against each other: their reports on one self-contained page, and as a terminal table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmconvert.errors import SourceError
from llmconvert.printable import printable
from llmconvert.report.report import Check, Report
from llmconvert.text.files import local_path
from llmconvert.validate.render.display import (
    format_bytes,
    format_seconds,
    label_of,
    printable_report,
    rows,
    split_interval,
)
from llmconvert.validate.render.html import template_environment
from llmconvert.validate.render.plots import comparison_plot, drift_plot

__all__ = ["ReportComparison", "compare_reports", "read_reports", "render_comparison", "render_comparison_table"]

_SHOWN = (
    "size_bytes",
    "bits_per_weight",
    "perplexity",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "block_divergence",
    "generation.agreement",
    "generation.looping",
    "speed.prefill",
    "speed.decode",
)
# Of these, what does not depend on the text that was measured on.
_WHATEVER_THE_TEXT = ("size_bytes", "bits_per_weight", "generation.agreement", "generation.looping")
_HIGHER_IS_BETTER = ("share", "tokens/s")


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One number of every artifact as text, in the reports' order.

    ``best`` holds the positions of the best, and none where the numbers don't compare.
    """

    label: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ReportComparison:
    """What several reports say, side by side.

    Attributes:
        reports: by a name that is unique among them.
        rows: how each was made, then what was measured.
        caveats: why some numbers don't compare.
        remarks: what else there is to say.
        links: to the pages of some of them, by name.
    """

    reports: Mapping[str, Report]
    rows: tuple[ComparedRow, ...]
    caveats: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)


def read_reports(places: Iterable[str]) -> dict[str, Report]:
    """The reports of artifact directories, or report files, each under the artifact's name.

    Artifacts of one name are told apart by where they lie.

    Raises:
        SourceError: there is no report, or a file is none.
    """
    found: list[tuple[str, Path, Report]] = []
    for place in dict.fromkeys(places):
        path = local_path(place)
        if path.is_dir():
            candidates = [path / "llmconvert" / "report.json", path / "report.json"]
            path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
            if not path.is_file():
                raise SourceError(
                    f"{place}: has no llmconvert/report.json; measure it (llmconvert validate {place} --reference "
                    "MODEL --text FILE --card)"
                )
        report = Report.read(path)
        found.append((report.model.name, _artifact_of(path), report))
    named: dict[str, Report] = {}
    for name, where, report in found:
        others = [other for same, other, _ in found if same == name and other != where]
        alone = sum(same == name for same, _, _ in found) == 1
        named[name if alone else f"{name} ({_told_apart(where, others)})"] = report
    return named


def _artifact_of(report: Path) -> Path:
    """The directory whose report it is; of a file by another name, itself."""
    path = report.absolute()
    if path.name != "report.json":
        return path
    return path.parent.parent if path.parent.name == "llmconvert" else path.parent


def _told_apart(place: Path, others: Iterable[Path]) -> str:
    """As much of the end of a path as no other one has."""
    ends = range(1, len(place.parts) + 1)
    shortest = next((end for end in ends if all(other.parts[-end:] != place.parts[-end:] for other in others)), 1)
    return str(Path(*place.parts[-shortest:]))


def compare_reports(reports: Mapping[str, Report]) -> ReportComparison:
    """Lay the numbers of several reports side by side."""
    values = list(reports.values())
    made = [
        ComparedRow("From", tuple(report.model.source for report in values)),
        ComparedRow("Method", tuple(report.model.method or "" for report in values)),
        ComparedRow("Scheme", tuple(report.model.scheme or "" for report in values)),
        ComparedRow("Format", tuple(report.model.format or "" for report in values)),
        ComparedRow("Calibrated on", tuple(report.model.calibration or "" for report in values)),
        ComparedRow("Time to quantize", tuple(_quantizing(report, "seconds") for report in values)),
        ComparedRow("Peak memory of that", tuple(_quantizing(report, "memory") for report in values)),
        ComparedRow("Checks", tuple(_verdict(report) for report in values)),
    ]
    # Benchmarks, and whatever else a check of its own measures.
    others = [check.name for report in values for check in report.checks if check.label and not check.quiet]
    shared = _Shared.of(values)
    measured = [_measured(name, values, shared.compares(name)) for name in dict.fromkeys((*_SHOWN, *others))]
    table = [row for row in made + measured if any(row.cells)]
    return ReportComparison(reports, tuple(table), tuple(_caveats(values, shared)))


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the reports have in common, and so what of them compares."""

    original: bool
    text: bool
    machine: bool

    @classmethod
    def of(cls, reports: list[Report]) -> _Shared:
        texts = {_text(check) for report in reports if (check := report.check("perplexity")) is not None}
        return cls(
            original=len({(report.model.source, report.model.revision) for report in reports}) == 1,
            text=len(texts) <= 1,
            machine=len({tuple(sorted(report.environment.items())) for report in reports}) == 1,
        )

    def compares(self, name: str) -> bool:
        if name not in _SHOWN:
            return True
        if name.startswith("speed."):
            return self.machine
        return self.original and (self.text or name in _WHATEVER_THE_TEXT)


def _measured(name: str, reports: list[Report], compares: bool) -> ComparedRow:
    cells = []
    for report in reports:
        row = next((row for row in rows(report) if row.name == name), None)
        cells.append("" if row is None else row.value)
    checks = [report.check(name) for report in reports]
    values = {index: check.value for index, check in enumerate(checks) if check is not None and check.value is not None}
    best: frozenset[int] = frozenset()
    if compares and len(set(values.values())) > 1:
        unit = next(check.unit for check in checks if check is not None)
        winner = (max if unit in _HIGHER_IS_BETTER else min)(values.values())
        best = frozenset(index for index, value in values.items() if value == winner)
    label = next((check.label for check in checks if check is not None and check.label), label_of(name))
    return ComparedRow(label, tuple(cells), best)


def _quantizing(report: Report, what: str) -> str:
    step = next((step for step in report.steps if step.name == "quantize"), None)
    if step is None:
        return ""
    if what == "seconds":
        return format_seconds(step.seconds)
    return format_bytes(step.peak_rss_bytes) if step.peak_rss_bytes else ""


def _verdict(report: Report) -> str:
    return f"{len(report.failed)} of {len(report.checks)} failed" if report.failed else report.outcome


def _caveats(reports: list[Report], shared: _Shared) -> Iterable[str]:
    if not shared.original:
        yield "They were made from different originals: divergence and agreement are each from its own."
    if not shared.text:
        yield "They were measured on different text or windows: their perplexities and divergences don't compare."
    if any(report.check("perplexity") is None for report in reports):
        yield "Not all were measured on text."
    if not shared.machine:
        yield "They were measured with different versions or on different machines: speeds don't compare."


def _text(check: Check) -> tuple[str, str]:
    return str(check.detail.get("digest")), str(check.detail.get("window"))


def render_comparison(comparison: ReportComparison) -> str:
    """The page. It loads nothing from anywhere."""
    drawn = (
        ("Size and quality; bars are 95 % intervals over windows of text.", comparison_plot(comparison.reports)),
        ("Drift ‖ĥ − h‖ / ‖h‖ of the hidden state after each block.", drift_plot(comparison.reports)),
    )
    return (
        template_environment(escape=True)
        .get_template("compare.html.j2")
        .render(
            comparison=comparison,
            names=list(comparison.reports),
            plots=[(caption, svg.decode()) for caption, svg in drawn if svg is not None],
        )
    )


def render_comparison_table(comparison: ReportComparison, console: Console) -> None:
    """Print the comparison; the best number of a row is bold, where numbers compare."""
    comparison = compare_reports(
        {printable(name): printable_report(report) for name, report in comparison.reports.items()}
    )
    table = Table()
    table.add_column("")
    for name in comparison.reports:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in comparison.rows:
        cells = [
            Text(split_interval(cell)[0], style="bold" if index in row.best else "")
            for index, cell in enumerate(row.cells)
        ]
        table.add_row(row.label, *cells)
    console.print(table)
    for caveat in comparison.caveats:
        console.print(Text(caveat, style="yellow"))
