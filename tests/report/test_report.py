"""The report: its JSON, its verdict, its rows of text, the terminal table."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from llmconvert.errors import GateError, SourceError
from llmconvert.report.report import Check, ModelInfo, Report, Step, environment, json_schema, require_passed
from llmconvert.report.section import Column, Plot, Section, Series
from llmconvert.validate.render.display import (
    format_bytes,
    format_count,
    format_runs,
    format_seconds,
    format_value,
    known_names,
    rows,
)
from llmconvert.validate.render.terminal import render_terminal

DOCS = Path(__file__).parent.parent.parent / "docs"
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
checks = st.builds(
    Check,
    name=st.text(min_size=1),
    value=numbers,
    reference=numbers,
    limit=numbers,
    ok=st.booleans(),
    unit=st.sampled_from(["", "bytes", "share", "nats", "tokens/s", "texts"]),
    detail=st.dictionaries(st.text(), st.text() | st.integers(-(2**53), 2**53) | st.none(), max_size=3),
)


def terminal(report: Report, width: int = 100, **options: dict[str, str]) -> str:
    stream = io.StringIO()
    render_terminal(report, Console(file=stream, width=width), **options)
    return stream.getvalue()


@given(checks=st.lists(checks, max_size=4), seconds=st.floats(0, 1e6))
def test_json_round_trip(checks: list[Check], seconds: float) -> None:
    report = Report(
        model=ModelInfo(name="a", source="b"), steps=(Step(name="s", seconds=seconds),), checks=tuple(checks)
    )
    assert Report.from_json(report.to_json()) == report
    assert report.verdict == all(check.ok for check in checks)
    assert len(rows(report)) == len(checks)


def test_the_schema_is_the_documented_one(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found) == {"schema", "outcome", "model", "environment", "steps", "checks"}
    assert found["outcome"] == "passed"
    assert found["schema"] == "llmconvert.report/1"
    assert all(
        set(check) == {"name", "value", "reference", "limit", "ok", "unit", "detail"} for check in found["checks"]
    )
    assert found["steps"][0] == {"name": "quantize", "seconds": 71.32, "peak_rss_bytes": 990_000_000}
    assert Report.read(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("checks", "outcome"),
    [
        ((), "not measured"),
        ((Check(name="size_bytes", value=3.0),), "not measured"),
        ((Check(name="size_bytes", value=3.0, ok=False),), "failed"),
        ((Check(name="perplexity", value=3.0),), "passed"),
        ((Check.unmeasured("generation.agreement", "no package", asked=False),), "not measured"),
        ((Check.unmeasured("generation.agreement", "no package", asked=True),), "failed"),
    ],
)
def test_nothing_measured_is_nothing_passed(checks: tuple[Check, ...], outcome: str) -> None:
    report = Report(model=ModelInfo(name="a", source="b"), checks=checks)
    assert report.outcome == outcome
    again = Report.from_json(report.to_json())
    assert again == report and json.loads(again.to_json())["outcome"] == outcome


def test_names_of_others_command_no_terminal(report: Report) -> None:
    """Architectures, prompts and tensors are called as their authors like."""
    evil = "\x1b[2J\x9b31m\u202e[/red]"
    section = Section(
        name="s", title=evil, text=evil, columns=(Column(heading=evil),), rows=((evil,),), shown=("terminal",)
    )
    checks = (
        Check(name=evil, label=evil, value=1.0, sections=(section,)),
        Check(name="kl_mean", ok=False, detail={"text": evil}),
        Check.unmeasured(evil, evil, asked=False),
    )
    model = report.model.model_copy(update={"name": evil, "source": evil})
    text = terminal(report.model_copy(update={"model": model, "checks": checks}))
    assert not set(text) & set("\x1b\x9b\u202e") and "\\x1b[2J\\x9b31m" in text


def test_numbers_that_are_none_become_null() -> None:
    report = Report(
        model=ModelInfo(name="a", source="b"), checks=(Check(name="x", value=math.nan, reference=math.inf),)
    )
    found = json.loads(report.to_json())["checks"][0]
    assert found["value"] is None and found["reference"] is None


def test_what_a_later_version_added_is_kept(report: Report) -> None:
    found = json.loads(report.to_json())
    found["steps"][0]["written_bytes"] = 7
    assert json.loads(Report.from_json(json.dumps(found)).to_json()) == found


def test_the_published_schema_is_that_of_the_code_and_reports_follow_it(report: Report) -> None:
    """``jsonschema`` is the judge. ``docs/report.schema.json`` is what this prints::

    python -c "from llmconvert.report.report import json_schema; print(json_schema(), end='')"
    """
    published = (DOCS / "report.schema.json").read_text()
    assert published == json_schema()
    validator = jsonschema.Draft202012Validator(json.loads(published))
    validator.check_schema(json.loads(published))
    section = Section(name="s", title="t", columns=(Column(heading="a"),), rows=((1,), ("b",), (None,)))
    checks = (*report.checks, Check(name="more", value=math.nan, label="l", quiet=True, sections=(section,)))
    validator.validate(json.loads(report.model_copy(update={"checks": checks}).to_json()))
    for wrong in ('{"schema": "llmconvert.report/1"}', '{"schema": "x", "model": {"name": "a", "source": "b"}}'):
        assert not validator.is_valid(json.loads(wrong))


def test_the_documentation_names_every_key_and_every_check() -> None:
    text = (DOCS / "report.md").read_text()
    for model in (Report, ModelInfo, Step, Check, Section, Column, Plot, Series):
        for name, field in model.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", text), f"{model.__name__}.{name}"
    for name in known_names():
        assert f"`{name}`" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report"),
        ("[]", "schema is 'list'"),
        ('{"schema": "llmconvert.report/2"}', "schema is 'llmconvert.report/2', expected 'llmconvert.report/1'"),
        ('{"schema": "llmconvert.report/1"}', "model"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        Report.read(tmp_path / "found.json")
    assert "found.json" in str(caught.value)
    with pytest.raises(SourceError, match="cannot be read"):
        Report.read(tmp_path / "missing.json")


def test_reports_are_values(report: Report) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report.checks[0].value = 1.0


def test_the_gate_names_what_failed() -> None:
    passing = Check(name="size_bytes", value=1)
    require_passed([passing])
    failing = [
        Check(name="kl_mean", value=0.5, limit=0.1, ok=False),
        Check(name="x", ok=False, detail={"text": "broke"}),
    ]
    with pytest.raises(GateError, match=r"kl_mean is 0\.5, allowed 0\.1; broke"):
        require_passed([passing, *failing])


def test_environment_names_versions_and_no_machine() -> None:
    import platform

    import torch

    found = environment()
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert platform.node() not in found.values()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (113_175_416, "bytes", "113.2 MB"),
        (999_960, "bytes", "1.0 MB"),
        (12, "bytes", "12 B"),
        (0.87312, "share", "87.3 %"),
        (0.07314, "nats", "0.0731 nats"),
        (3.2e-9, "nats", "3.20e-09 nats"),
        (0, "nats", "0 nats"),
        (19.24, "tokens/s", "19.2 tokens/s"),
        (13.4187, "", "13.42"),
        (21056.3, "", "21,056"),
        (6.7263, "bits", "6.726"),
        (210, "tensors", "210"),
        (None, "", ""),
    ],
)
def test_numbers_for_people(value: float | None, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


def test_other_formats() -> None:
    assert [format_seconds(value) for value in (0.0412, 0.96, 8.44, 125, 3720)] == [
        "41 ms",
        "1.0 s",
        "8.4 s",
        "2 min 05 s",
        "1 h 02 min",
    ]
    assert [format_count(value) for value in (12, 134_515_008, 6.7e9)] == ["12", "134.5 M", "6.7 B"]
    assert format_bytes(2.5e12) == "2.5 TB"
    assert format_runs([7, 0, 2, 1, 9, 8, 5]) == ["0–2", "5", "7–9"] and format_runs([]) == []


def test_rows_show_change_interval_and_limit(report: Report) -> None:
    found = {row.name: row for row in rows(report)}
    perplexity = found["perplexity"]
    assert perplexity.value == "13.42 (12.21 to 14.93)"
    assert perplexity.reference == "12.11 (11.02 to 13.38)"
    assert perplexity.change == "+10.8 % (+9.7 % to +12.1 %)"
    assert perplexity.limit == "≤ 15.14"
    assert found["size_bytes"].change == "\N{MINUS SIGN}57.9 %"
    assert found["generation.agreement"].limit == "≥ 30.0 %"


def test_the_table_fits_a_terminal(report: Report) -> None:
    text = terminal(report, 100, locations={"artifact": "out/demo", "page": "out/demo/" + "x" * 120})
    assert "Weights on disk" in text and "113.2 MB" in text and "269.1 MB" in text
    assert "+9.7 % to +12.1 %" in text and "passed all 10 checks" in text
    # Paths stay whole, to be copied; everything else keeps to the width.
    assert "out/demo/" + "x" * 120 in text
    assert all(len(line) <= 100 for line in text.splitlines() if "xxx" not in line)


def test_the_table_names_what_failed(report: Report) -> None:
    broken = Check(
        name="inventory", value=2, limit=0, ok=False, unit="tensors", detail={"text": "lost [bold]two[/bold]"}
    )
    text = terminal(report.model_copy(update={"checks": (*report.checks, broken)}))
    assert "✗ inventory: lost [bold]two[/bold]" in text and "passed" not in text
