"""Sections: whatever a check or a step has to show appears in every rendering, and nowhere twice."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from support.html_page import parse

from llmconvert.report.report import Check, Report, Step
from llmconvert.report.section import Column, Plot, Section, Series
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.render.card import Address, render_card
from llmconvert.validate.render.display import section_table
from llmconvert.validate.render.html import render_html
from llmconvert.validate.render.section_plot import section_plot
from llmconvert.validate.render.terminal import render_terminal


def ladder(**changes: Any) -> Section:
    values: dict[str, Any] = {
        "name": "memory-ladder",
        "title": "Memory by <length>",
        "text": "Counted, not guessed.",
        "columns": (Column(heading="tokens"), Column(heading="cache", unit="bytes"), Column(heading="mode | why")),
        "rows": ((1024, 23_068_672, "eager|slow"), (2048, None, "flash")),
        "plot": Plot(
            caption="Cache over length.",
            x_label="context, tokens",
            y_label="bytes",
            x_scale="log",
            series=(Series(label="artifact", x=(1024, 2048), y=(1.0, 2.0), low=(0.5, 1.5), high=(1.5, 2.5)),),
            limit=3,
        ),
        "shown": ("terminal", "card"),
    }
    return Section(**{**values, **changes})


def carried(report: Report, section: Section) -> Report:
    check = Check(name="memory.fits", label="Fits the memory", value=1, quiet=True, sections=(section,))
    return report.model_copy(update={"checks": (*report.checks, check)})


def terminal(report: Report) -> str:
    stream = io.StringIO()
    render_terminal(report, Console(file=stream, width=120))
    return stream.getvalue()


def test_a_check_carries_a_section_into_every_rendering(report: Report) -> None:
    found = carried(report, ladder())
    assert Report.from_json(found.to_json()) == found
    page = parse(render_html(found))
    text = " ".join(" ".join(page.text).split())
    for words in ("Memory by <length>", "Counted, not guessed.", "1,024", "23.1 MB", "Cache over length.", "Fits the"):
        assert words in text
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and "memory-ladder" in ids
    shown = terminal(found)
    assert "Memory by <length>" in shown and "23.1 MB" in shown and "Counted, not guessed." in shown
    assert "Fits the memory" not in shown
    card = render_card(
        found, address=Address("x/y"), recipe="model: x", section_plots={"memory-ladder": "llmconvert/m.png"}
    )
    assert "## Memory by <length>\n\nCounted, not guessed.\n\n| tokens | cache | mode | why |" not in card
    assert re.search(
        r"\| tokens \| cache \| mode \\\| why \|\n\|---:\|---:\|---\|\n\| 1,024 \| 23\.1 MB \| eager\\\|slow \|\n", card
    )
    assert "![Cache over length.](llmconvert/m.png)" in card and "Fits the memory" not in card


def test_a_section_without_rows_still_says_why(report: Report) -> None:
    """What could not be measured leaves a table empty, and its reason is the text."""
    shown = terminal(carried(report, ladder(rows=())))
    assert "Memory by <length>" in shown and "Counted, not guessed." in shown and "┃ tokens" not in shown


def test_a_section_appears_only_where_it_wants_to(report: Report) -> None:
    found = carried(report, ladder(shown=()))
    assert "Memory by" not in terminal(found)
    assert "Memory by" not in render_card(found, address=Address("x/y"), recipe="model: x")
    assert "Memory by" in render_html(found)


def test_a_step_carries_sections_too(report: Report) -> None:
    found = report.model_copy(update={"steps": (Step(name="attention", seconds=1, sections=(ladder(),)),)})
    assert [section.name for section in found.sections] == ["memory-ladder"]
    assert "Memory by" in terminal(found) and "Memory by" in render_html(found)


def test_what_is_empty_is_left_out_of_the_json(report: Report) -> None:
    values = json.loads(report.to_json())
    assert "sections" not in values["steps"][0] and not {"sections", "label", "quiet"} & set(values["checks"][0])


@pytest.mark.parametrize("kind", ["line", "points", "bars"])
def test_every_kind_of_plot_is_drawn(kind: str) -> None:
    plain = ladder().plot
    assert plain is not None
    series = (
        Series(label="before", x=("q", "k", "v"), y=(1, None, 3))
        if kind == "bars"
        else Series(label="before", x=(1, 2, 3), y=(1, None, 3)),
        Series(label="after", x=("k",), y=(2,)) if kind == "bars" else Series(label="after", x=(2,), y=(2,)),
    )
    section = ladder(plot=plain.model_copy(update={"kind": kind, "series": series, "x_scale": "linear"}))
    svg = section_plot(section)
    assert svg is not None and svg == section_plot(section)
    words = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter()}
    assert {"before", "after", "limit", "bytes"} <= words
    picture = section_plot(section, "png")
    assert picture is not None and picture.startswith(b"\x89PNG")


def test_logarithmic_axes_name_what_was_measured_in_its_unit() -> None:
    lengths = tuple(512.0 * 2**step for step in range(6))
    series = Series(label="flash", unit="bytes", x=lengths, y=tuple(3e4 * length for length in lengths))
    plot = Plot(caption="Memory.", x_label="tokens", y_label="memory", x_scale="log", y_scale="log", series=(series,))
    svg = section_plot(ladder(plot=plot))
    assert svg is not None
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:6] == ["512", "1,024", "2,048", "4,096", "8,192", "16,384"]
    assert {"20.0 MB", "50.0 MB", "100.0 MB"} <= set(texts) and not [text for text in texts if "×" in text]


def test_no_plot_without_numbers() -> None:
    assert section_plot(ladder(plot=None)) is None
    empty = Plot(caption="", x_label="", y_label="", series=(Series(label="a", x=(1,), y=(None,)),))
    assert section_plot(ladder(plot=empty)) is None
    assert section_table(ladder(columns=(), rows=())).rows == ()


@pytest.mark.parametrize(
    ("changes", "message"), [({"rows": ((1,),)}, "1 cells for 3"), ({"name": "../etc"}, "String should match pattern")]
)
def test_sections_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ladder(**changes)
    with pytest.raises(ValidationError, match="different lengths"):
        Series(label="a", x=(1, 2), y=(1,))


@dataclass(frozen=True)
class Counting(Measurement):
    """A measurement of the kind that others add."""

    name: str

    def require(self) -> None:
        """Nothing is needed."""

    def measure(self, subject: Subject) -> Sequence[Check]:
        return [Check(name=self.name, value=len(subject.stored), reference=len(subject.original or ()))]


def test_a_measurement_is_made_with_the_artifact_at_hand(original: Path, quantized: Path) -> None:
    with SafetensorsCheckpoint(original) as reference:
        checks = validate_artifact(quantized, [Counting("count")], reference=reference, device=torch.device("cpu"))
    assert checks[-1].name == "count" and (checks[-1].value, checks[-1].reference) == (48, 20)
