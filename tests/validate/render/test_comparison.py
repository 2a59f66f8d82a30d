"""Several reports side by side: read from artifacts, as a table and as a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from support.html_page import parse

from llmconvert.cli import main
from llmconvert.errors import SourceError
from llmconvert.report.report import Report
from llmconvert.validate.render.comparison import (
    compare_reports,
    read_reports,
    render_comparison,
    render_comparison_table,
)


def variant(report: Report, name: str, scheme: str, **values: float) -> Report:
    """Another artifact of the same original: some checks with other values."""
    checks = [check.model_copy(update={"value": values.get(check.name, check.value)}) for check in report.checks]
    model = report.model.model_copy(update={"name": name, "scheme": scheme})
    return report.model_copy(update={"checks": tuple(checks), "model": model})


@pytest.fixture
def artifacts(report: Report, tmp_path: Path) -> list[str]:
    """Three artifacts, two of them with one name, one given by its report file."""
    reports = [
        report,
        variant(report, "Tiny-W8A16", "w8a16-g64-sym", size_bytes=180_000_000, perplexity=12.2, top1_agreement=0.98),
        variant(report, "Tiny-W4A16", "w4a16-g32-sym", size_bytes=120_000_000, perplexity=13.0),
    ]
    places = []
    for index, written in enumerate(reports):
        folder = tmp_path / f"artifact-{index}" / "llmconvert"
        folder.mkdir(parents=True)
        written.write(folder / "report.json")
        places.append(str(folder.parent))
    return [*places[:2], str(Path(places[2]) / "llmconvert" / "report.json")]


def test_artifacts_of_one_name_are_told_apart_by_where_they_lie(report: Report, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one/w4", "two/w4", "two/gqa-w4/report.json", "three.json")]
    for place in places:
        path = place if place.suffix else place / "llmconvert" / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write(path)
    names = list(read_reports([*map(str, places), str(places[0])]))
    assert names == [f"{report.model.name} ({label})" for label in ("one/w4", "two/w4", "gqa-w4", "three.json")]


def test_numbers_side_by_side(artifacts: list[str]) -> None:
    comparison = compare_reports(read_reports(artifacts))
    assert list(comparison.reports) == ["Tiny-W4A16 (artifact-0)", "Tiny-W8A16", "Tiny-W4A16 (artifact-2)"]
    rows = {row.label: row for row in comparison.rows}
    assert rows["Scheme"].cells == ("w4a16-g64-sym", "w8a16-g64-sym", "w4a16-g32-sym")
    assert rows["Weights on disk"].cells == ("113.2 MB", "180.0 MB", "120.0 MB")
    assert rows["Weights on disk"].best == {0} and rows["Perplexity"].best == {1}
    assert rows["Same most likely next token"].best == {1}
    assert rows["KL divergence per token, mean"].best == frozenset()
    assert rows["Time to quantize"].cells == ("1 min 11 s",) * 3
    assert comparison.caveats == ()


def test_what_does_not_compare_is_said(report: Report) -> None:
    quality = report.check("perplexity")
    assert quality is not None
    other = quality.model_copy(update={"detail": {**quality.detail, "window": 2048}})
    changed: dict[str, Any] = {
        "checks": tuple(other if check.name == "perplexity" else check for check in report.checks),
        "model": report.model.model_copy(update={"source": "maker/Other"}),
        "environment": {"torch": "2.12.0"},
    }
    caveats = " ".join(compare_reports({"a": report, "b": report.model_copy(update=changed)}).caveats)
    assert "different originals" in caveats and "different text or windows" in caveats and "speeds" in caveats
    silent = report.model_copy(update={"checks": report.checks[:1]})
    assert "Not all were measured on text." in compare_reports({"a": report, "b": silent}).caveats


@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("nothing", {"Weights on disk", "Perplexity", "Speed of writing"}),
        ("text", {"Weights on disk", "Speed of writing"}),
        ("original", {"Speed of writing"}),
        ("machine", {"Weights on disk", "Perplexity"}),
    ],
)
def test_no_number_is_best_where_numbers_do_not_compare(report: Report, what: str, kept: set[str]) -> None:
    other = variant(report, "other", "w8a16-g64-sym", size_bytes=1e6, perplexity=99.0, **{"speed.decode": 1.0})
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "text": {
            "checks": tuple(
                check.model_copy(update={"detail": {**check.detail, "window": 2048}})
                if check.name == "perplexity"
                else check
                for check in other.checks
            )
        },
        "original": {"model": other.model.model_copy(update={"source": "maker/Other"})},
        "machine": {"environment": {"torch": "2.12.0"}},
    }
    rows = {row.label: row for row in compare_reports({"a": report, "b": other.model_copy(update=changes[what])}).rows}
    named = {"Weights on disk", "Perplexity", "Speed of writing"}
    assert {label for label in named if rows[label].best} == kept


def test_the_page_is_well_formed_and_loads_nothing(artifacts: list[str]) -> None:
    page = parse(render_comparison(compare_reports(read_reports(artifacts))))
    text = " ".join(" ".join(page.text).split())
    assert (
        "3 artifacts compared" in text
        and "180.0 MB" in text
        and "Tiny-W4A16 (artifact-2)" in text
        and "original" in text
    )
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))
    assert not [tag for tag, *_ in page.attributes if tag in ("script", "link", "img", "iframe")]


def test_the_table(artifacts: list[str]) -> None:
    stream = io.StringIO()
    render_comparison_table(compare_reports(read_reports(artifacts)), Console(file=stream, width=120))
    (line,) = [line for line in stream.getvalue().splitlines() if "Perplexity" in line]
    assert [word for word in line.split() if word[0].isdigit()] == ["13.42", "12.20", "13.00"]


def test_the_command(artifacts: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", *artifacts, "--html", str(tmp_path / "all.html")])
    assert result.exit_code == 0, result.output
    assert "Tiny-W8A16" in result.output and "3 artifacts compared" in (tmp_path / "all.html").read_text()


def test_a_directory_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no llmconvert/report\.json; measure it"):
        read_reports([str(tmp_path)])
    assert CliRunner().invoke(main, ["report", str(tmp_path)]).exit_code == 4
