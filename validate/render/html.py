"""``report.html``: the whole report on one self-contained page, for a phone, a desk and a printer."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import jinja2

from llmconvert.report.report import Report
from llmconvert.report.section import Section
from llmconvert.validate.render.blame import blame
from llmconvert.validate.render.display import (
    format_bytes,
    format_count,
    format_seconds,
    format_spacing,
    outcome,
    rows,
    section_table,
    split_interval,
)
from llmconvert.validate.render.plots import divergence_plot, layer_error_plot, quality_plot
from llmconvert.validate.render.section_plot import section_plot

__all__ = ["render_html", "template_environment"]

_TILES = ("size_bytes", "perplexity", "kl_mean", "top1_agreement", "generation.agreement", "bits_per_weight")


def template_environment(*, escape: bool) -> jinja2.Environment:
    """The shipped templates; a variable that a template misses is an error."""
    folder = resources.files("llmconvert.validate") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if escape else _prose,
    )
    environment.filters.update(cell=_cell, code=_code, verbatim=_Verbatim)
    environment.filters.update(
        bytes=format_bytes, count=format_count, seconds=format_seconds, spacing=format_spacing, split=split_interval
    )
    return environment


class _Verbatim(str):
    """Text for a code block, where nothing means anything."""


def _prose(value: object) -> object:
    """Text of others inside Markdown: neither HTML, links and pictures, nor lines of its own."""
    if isinstance(value, _Verbatim) or not isinstance(value, str):
        return value
    return re.sub(r"\s*\n\s*", " ", value.replace("<", "&lt;").replace("](", "]&#40;"))


def _cell(value: str) -> str:
    """Text that stays in its line and its cell."""
    return " ".join(value.split()).replace("|", "\\|")


def _code(value: str) -> _Verbatim:
    """Text between backticks, or in a line of a code block."""
    return _Verbatim(" ".join(value.replace("`", "'").split()))


def render_html(report: Report, *, recipe: str | None = None) -> str:
    """The page. It loads nothing from anywhere.

    Args:
        recipe: the resolved recipe as YAML, to be shown at the end.
    """
    template = template_environment(escape=True).get_template("report.html.j2")
    by_name = {row.name: row for row in rows(report)}
    return template.render(
        report=report,
        model=report.model,
        rows=list(by_name.values()),
        tiles=[by_name[name] for name in _TILES if name in by_name and by_name[name].value],
        plots=_plots(report),
        sections=[(section, section_table(section), _section_svg(section)) for section in report.sections],
        about=_detail(report, "perplexity"),
        texts=_detail(report, "generation.agreement").get("texts", []),
        worst=_detail(report, "kl_p99").get("worst", []),
        tensors=_detail(report, "inventory").get("tensors", []),
        outcome=outcome(report),
        blame=blame(report),
        recipe=recipe,
    )


def _detail(report: Report, name: str) -> dict[str, Any]:
    check = report.check(name)
    return {} if check is None else dict(check.detail)


def _section_svg(section: Section) -> str:
    svg = section_plot(section)
    return "" if svg is None else svg.decode()


def _plots(report: Report) -> list[tuple[str, str]]:
    """(caption, inline SVG) of every plot the report has numbers for."""
    drawn = (
        ("Size and quality; bars are 95 % intervals over windows of text.", quality_plot(report)),
        (
            "Drift ‖ĥ − h‖ / ‖h‖ of the hidden state after each block, and after the block alone, entered with the "
            "original's state.",
            divergence_plot(report),
        ),
        ("Relative error ‖w − ŵ‖ / ‖w‖ of each quantized weight.", layer_error_plot(report)),
    )
    return [(caption, svg.decode()) for caption, svg in drawn if svg is not None]
