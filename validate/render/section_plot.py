"""The plot of a report's section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmconvert.report.section import Plot, Section, Series
from llmconvert.validate.render.display import format_value
from llmconvert.validate.render.drawing import COLOURS, INK, MARKERS, Format, legend, render, style

__all__ = ["section_plot"]

_BARS_WIDTH = 0.8
# Above this many, the labels of bars would run into each other.
_LEVEL_LABELS = 5
_LOG_TICKS = 7
# An axis starts at zero if the lowest value is below this share of the highest.
_NEAR_ZERO = 0.4


def section_plot(section: Section, format: Format = "svg") -> bytes | None:
    """A section's plot; None if it has none, or no numbers to draw."""
    plot = section.plot
    if plot is None or not any(value is not None for series in plot.series for value in series.y):
        return None
    return render(lambda figure: _draw(figure, plot), format, f"section-{section.name}")


def _draw(figure: Any, plot: Plot) -> None:
    if plot.kind == "panels":
        _panels(figure, plot)
        return
    axes = figure.add_subplot()
    style(axes)
    if plot.kind == "bars":
        _bars(axes, plot)
    else:
        for index, series in enumerate(plot.series):
            _points(axes, series, index, joined=plot.kind == "line")
        axes.set_xscale(plot.x_scale)
        if plot.x_scale == "linear" and all(float(x).is_integer() for series in plot.series for x in series.x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if plot.x_scale == "log":
            _name_places(axes, plot.series)
    axes.set_yscale(plot.y_scale)
    if plot.y_scale == "log":
        unit = plot.series[0].unit
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: format_value(value, unit) if unit else f"{value:,g}")
        axes.yaxis.set_minor_formatter("")
    if plot.limit is not None:
        axes.axhline(plot.limit, color=INK, linestyle="--", linewidth=1, alpha=0.7, label="limit")
    values = [value for series in plot.series for value in (*series.y, *series.low, *series.high) if value is not None]
    if (
        plot.y_scale == "linear"
        and (plot.kind == "bars" or min(values) < _NEAR_ZERO * max(values))
        and min(values) >= 0
    ):
        axes.set_ylim(bottom=0)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if len(plot.series) > 1 or plot.limit is not None:
        legend(figure, 3)


def _points(axes: Any, series: Series, index: int, *, joined: bool) -> None:
    axes.errorbar(
        [float(x) for x in series.x],
        _gaps(series),
        yerr=_error(series),
        marker=MARKERS[index % len(MARKERS)],
        linestyle="-" if joined else "none",
        color=COLOURS[index % len(COLOURS)],
        markersize=4 if joined else 7,
        linewidth=1.4,
        capsize=3,
        label=series.label,
    )


def _name_places(axes: Any, series: Sequence[Series]) -> None:
    """Ticks of a logarithmic axis where something was measured, as far as their labels have room."""
    places = sorted({float(x) for line in series for x in line.x})
    step = -(-len(places) // _LOG_TICKS)
    shown = places[:: max(1, step)]
    axes.set_xticks(shown, [f"{place:,.0f}" if place >= 10 else f"{place:g}" for place in shown])
    axes.set_xticks([], minor=True)


def _bars(axes: Any, plot: Plot) -> None:
    """Bars of several series beside each other, in the order in which their labels first occur."""
    labels = list(dict.fromkeys(str(x) for series in plot.series for x in series.x))
    width = _BARS_WIDTH / len(plot.series)
    for index, series in enumerate(plot.series):
        shift = (index - (len(plot.series) - 1) / 2) * width
        axes.bar(
            [labels.index(str(x)) + shift for x in series.x],
            _gaps(series),
            width,
            yerr=_error(series),
            capsize=3,
            color=COLOURS[index % len(COLOURS)],
            label=series.label,
        )
    slanted = len(labels) > _LEVEL_LABELS
    axes.set_xticks(range(len(labels)), labels, rotation=30 if slanted else 0, ha="right" if slanted else "center")


def _panels(figure: Any, plot: Plot) -> None:
    """A panel per series, side by side; the labels of the bars stand at the first, from top to bottom."""
    panels = figure.subplots(1, len(plot.series), sharey=True, squeeze=False)[0]
    for index, (axes, series) in enumerate(zip(panels, plot.series, strict=True)):
        style(axes)
        places = list(range(len(series.x)))
        axes.barh(places, _gaps(series), 0.65, color=COLOURS[index % len(COLOURS)])
        known = [value for value in series.y if value is not None]
        axes.set_xlim(0, 1.5 * max(known, default=1.0))
        for place, value in zip(places, series.y, strict=True):
            text = "not measured" if value is None else f" {format_value(value, series.unit)}"
            axes.annotate(text, (value or 0, place), va="center", color=INK, fontsize=9)
        axes.set_yticks(places, [str(x) for x in series.x])
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_title(series.label, color=INK, fontsize=10, loc="left")
    panels[0].invert_yaxis()


def _gaps(series: Series) -> list[float]:
    return [float("nan") if value is None else value for value in series.y]


def _error(series: Series) -> list[list[float]] | None:
    if not series.low or not series.high:
        return None
    values = _gaps(series)
    return [
        [max(0.0, value - low) for value, low in zip(values, series.low, strict=True)],
        [max(0.0, high - value) for value, high in zip(values, series.high, strict=True)],
    ]
