"""The pages in a real browser: they load nothing, fit a phone, are legible in light and dark, and can be printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chromium import CHROMIUM, look_at, print_page

from llmconvert.report.report import Check, Report
from llmconvert.report.section import Column, Plot, Section, Series
from llmconvert.validate.render.comparison import compare_reports, render_comparison
from llmconvert.validate.render.html import render_html

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


def one(report: Report) -> str:
    """A report with a wide section, a failed check and a recipe with a long line."""
    section = Section(
        name="wide",
        title="A wide table",
        columns=tuple(Column(heading=f"a heading {index}") for index in range(9)),
        rows=(tuple(f"model.layers.{index}.self_attn.q_proj" for index in range(9)),),
        plot=Plot(caption="c", x_label="x", y_label="y", series=(Series(label="s", x=(1, 2), y=(3, 4)),), limit=5),
    )
    failed = Check(name="max", label="A limit", value=2, limit=1, ok=False, sections=(section,), detail={"text": "no"})
    changed = report.model_copy(update={"checks": (*report.checks, failed)})
    return render_html(changed, recipe="model: " + "a/very-long-name" * 20)


def several(report: Report) -> str:
    return render_comparison(compare_reports({f"Artifact-number-{index}-W4A16": report for index in range(4)}))


def luminance(colour: str) -> float:
    """Of an opaque sRGB colour (WCAG 2.2, relative luminance)."""
    red, green, blue = (float(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3])
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", [one, several])
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_legible_at_every_width_and_in_both_schemes(
    page: Callable[[Report], str], width: int, dark: bool, report: Report, tmp_path: Path
) -> None:
    found = look_at(page(report), tmp_path, width=width, dark=dark)
    assert found["dark"] == dark and found["width"] == width
    assert found["needed"] <= width, "the page scrolls sideways"
    assert found["loaded"] == []
    assert len(found["texts"]) > 50
    for text in found["texts"]:
        assert contrast(text["colour"], text["behind"]) >= 4.5, text
        assert text["right"] <= width, text
        assert text["pixels"] >= 7, text
    dark_behind = {luminance(text["behind"]) < 0.2 for text in found["texts"]}
    assert dark_behind == {dark}


def test_printed_on_few_pages_in_dark_ink(report: Report, tmp_path: Path) -> None:
    printed = print_page(one(report), tmp_path)
    assert printed.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8
