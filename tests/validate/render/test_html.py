"""The page and its plots: well-formed, self-contained, and showing the numbers that were measured."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import pytest
from support.html_page import parse

from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.validate.render.html import render_html
from llmconvert.validate.render.plots import Format, divergence_plot, layer_error_plot, quality_plot


def test_the_page_is_well_formed_and_holds_the_numbers(report: Report) -> None:
    page = parse(render_html(report, recipe="model: maker/Tiny\n# <script>\n"))
    text = " ".join(" ".join(page.text).split())
    for number in ("113.2 MB", "13.42", "12.21 to 14.93", "+9.7 % to +12.1 %", "0.0731 nats", "87.3 %", "42.1 %"):
        assert number in text
    assert "≤ 15.14" in text and "8,176 predictions" in text and "0.12 % also occur" in text
    assert "1 min 11 s" in text and "990.0 MB" in text and "134.5 M parameters" in text
    assert "passed all 10 checks" in text
    # Text of models and recipes stays text.
    assert "<b>1 < 2</b>" in text and "</div>" in text and "# <script>" in text and "if a < b &" in text


def test_the_page_loads_nothing_and_ids_are_unique(report: Report) -> None:
    page = parse(render_html(report))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert tag not in ("script", "link", "img", "iframe")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#") and value[1:] in ids
    assert not re.search(r"@import|url\((?!#)", render_html(report))


def test_failures_and_missing_parts_show(report: Report) -> None:
    broken = Check(name="perplexity", ok=False, detail={"dataset": "d", "windows": 1, "window": 4, "text": "all NaN"})
    page = parse(render_html(Report(model=ModelInfo(name="a", source="b"), checks=(broken,))))
    text = " ".join(page.text)
    assert "1 of 1 checks failed" in text and "all NaN" in text
    checks = tuple(check.model_copy(update={"ok": check.name != "kl_mean"}) for check in report.checks)
    blamed = " ".join(parse(render_html(report.model_copy(update={"checks": checks}))).text)
    assert "To blame: the blocks that err most by themselves are model.layers.1 (3.5 %)" in blamed
    empty = Report(model=ModelInfo(name="a", source="b"))
    assert "not measured: nothing here tells" in " ".join(parse(render_html(empty)).text)
    unread = Check.unmeasured("runtime", "it does not fit", asked=False)
    shown = " ".join(parse(render_html(empty.model_copy(update={"checks": (unread,)}))).text)
    assert "it does not fit" in shown and "not measured" in shown and "✓" not in shown


@pytest.mark.parametrize("draw", [quality_plot, divergence_plot, layer_error_plot])
def test_plots_are_the_same_every_time_and_leave_matplotlib_alone(draw: object, report: Report) -> None:
    assert callable(draw)
    before = dict(mpl.rcParams)
    assert draw(report) == draw(report) and draw(report, "png") == draw(report, "png")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("format", ["svg", "png"])
def test_plot_formats(format: Format, report: Report) -> None:
    for plot in (quality_plot(report, format), divergence_plot(report, format), layer_error_plot(report, format)):
        assert plot is not None
        if format == "png":
            assert plot.startswith(b"\x89PNG") and len(plot) > 5000
        else:
            assert ElementTree.fromstring(plot).tag.endswith("svg")


def test_plots_show_what_was_measured(report: Report) -> None:
    quality, layers = quality_plot(report), layer_error_plot(report)
    assert quality is not None and layers is not None
    words = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(quality).iter()}
    assert {"113.2 MB, 13.42", "269.1 MB, 12.11", "original", "artifact"} <= words
    words = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(layers).iter()}
    assert {"up_proj", "down_proj", "layer"} <= words
    drift = divergence_plot(report)
    assert drift is not None
    words = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(drift).iter()}
    assert {"block", "after the block", "by the block alone"} <= words
    assert b"currentColor" in quality and b"#1e2328" not in quality


def test_no_plot_without_numbers(report: Report) -> None:
    alone = report.model_copy(update={"checks": report.checks[:1]})
    assert quality_plot(alone) is None and layer_error_plot(alone) is None and divergence_plot(alone) is None
