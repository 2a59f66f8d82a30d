"""Plots of quality, drift and layer errors; :mod:`llmconvert.validate.render.section_plot` has those of sections."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmconvert.report.report import Check, Report
from llmconvert.validate.render import pareto
from llmconvert.validate.render.display import format_bytes
from llmconvert.validate.render.drawing import COLOURS, INK, MARKERS, Format, legend, render, style

__all__ = ["Format", "comparison_plot", "divergence_plot", "drift_plot", "layer_error_plot", "quality_plot"]

_AXES: Mapping[pareto.Measure, str] = {
    "perplexity": "perplexity, lower is better",
    "kl_mean": "KL from the original, nats",
}
_LAYER = re.compile(r"(?:.*\.)?(\d+)\.(.+)\.weight")


@dataclass(frozen=True, slots=True)
class _Point:
    label: str
    size: float
    value: float
    interval: tuple[float, float] | None
    colour: str


def quality_plot(report: Report, format: Format = "svg") -> bytes | None:
    """Size on disk against perplexity, from the original to the artifact, with 95 % intervals.

    None if the report lacks one of the four numbers.
    """
    size, quality = report.check("size_bytes"), report.check("perplexity")
    if size is None or size.value is None or size.reference is None:
        return None
    if quality is None or quality.value is None or quality.reference is None:
        return None
    points = (
        _Point("original", size.reference, quality.reference, _interval(quality, "reference_"), COLOURS[8]),
        _Point("artifact", size.value, quality.value, _interval(quality, ""), COLOURS[0]),
    )
    return render(lambda figure: _draw_quality(figure, points), format, "quality")


def layer_error_plot(report: Report, format: Format = "svg") -> bytes | None:
    """Relative error of every quantized tensor, by layer and kind. None if none was quantized."""
    inventory = report.check("inventory")
    series = _errors_by_kind(inventory.detail.get("tensors", ()) if inventory else ())
    if not series:
        return None
    return render(lambda figure: _draw_errors(figure, series), format, "layers")


def comparison_plot(reports: Mapping[str, Report], format: Format = "svg") -> bytes | None:
    """Size on disk against quality of several artifacts and of their originals. None with fewer than two points.

    Quality is what :func:`~llmconvert.validate.render.pareto.measure_of` says.
    From three artifacts on, a line joins those that no other one beats in both, and a ring marks its knee.
    """
    measure, points = pareto.measure_of(reports), list[_Point]()
    for index, (label, report) in enumerate(reports.items()):
        size, quality = report.check("size_bytes"), report.check(measure)
        if size is None or quality is None or size.value is None or quality.value is None:
            continue
        reference = 0.0 if measure == "kl_mean" else quality.reference
        points.append(_Point(label, size.value, quality.value, _interval(quality, ""), COLOURS[index % 8]))
        known = {(point.size, point.value) for point in points}
        if size.reference and reference is not None and (size.reference, reference) not in known:
            before = _interval(quality, "reference_")
            points.append(_Point("original", size.reference, reference, before, COLOURS[8]))
    if len(points) < 2:
        return None
    made = pareto.points(reports, measure)
    line, bend = pareto.front(made) if len(made) > 2 else [], pareto.knee(made)
    return render(lambda figure: _draw_comparison(figure, points, line, bend, _AXES[measure]), format, "comparison")


def drift_plot(reports: Mapping[str, Report], format: Format = "svg") -> bytes | None:
    """Drift of the hidden state after each block, one line per artifact. None if it was not measured."""
    lines = {
        label: (index, check.detail["blocks"])  # the index gives an artifact the same colour in both plots
        for index, (label, report) in enumerate(reports.items())
        if (check := report.check("block_divergence")) is not None and check.detail.get("blocks")
    }
    return render(lambda figure: _draw_drifts(figure, lines), format, "drift") if lines else None


def divergence_plot(report: Report, format: Format = "svg") -> bytes | None:
    """Drift of the hidden state after each block, and what each block errs alone. None if it was not measured."""
    check = report.check("block_divergence")
    blocks = check.detail.get("blocks", ()) if check else ()
    if not blocks:
        return None
    return render(lambda figure: _draw_divergence(figure, blocks), format, "divergence")


def _interval(check: Check, prefix: str) -> tuple[float, float] | None:
    low, high = check.detail.get(f"{prefix}low"), check.detail.get(f"{prefix}high")
    return None if low is None or high is None else (low, high)


def _draw_quality(figure: Any, points: tuple[_Point, _Point]) -> None:
    axes = figure.add_subplot()
    style(axes)
    before, after = points
    arrow = {"arrowstyle": "->", "color": INK, "alpha": 0.6, "shrinkA": 7, "shrinkB": 7}
    axes.annotate("", (after.size, after.value), (before.size, before.value), arrowprops=arrow)
    highest = max(point.value for point in points)
    for point in points:
        bars = None
        if point.interval is not None:
            bars = [[point.value - point.interval[0]], [point.interval[1] - point.value]]
        axes.errorbar([point.size], [point.value], yerr=bars, fmt="o", markersize=9, color=point.colour, capsize=4)
        # Above the upper point and below the lower one, clear of the arrow between them.
        above = point.value == highest
        axes.annotate(
            f"{point.label}\n{format_bytes(point.size)}, {point.value:.2f}",
            (point.size, point.value),
            xytext=(10, 6 if above else -6),
            textcoords="offset points",
            va="bottom" if above else "top",
            color=INK,
        )
    axes.set_xlim(0, 1.4 * max(point.size for point in points))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value).replace(".0 ", " "))
    axes.set_xlabel("weights on disk")
    axes.set_ylabel("perplexity, lower is better")


def _draw_comparison(
    figure: Any, points: Sequence[_Point], line: Sequence[pareto.Point], bend: pareto.Point | None, title: str
) -> None:
    axes = figure.add_subplot()
    style(axes)
    if line:
        axes.step([one.size for one in line], [one.cost for one in line], where="post", color=INK, alpha=0.35, zorder=0)
    if bend is not None:
        axes.plot(
            bend.size, bend.cost, marker="o", markersize=15, markerfacecolor="none", color=INK, alpha=0.6, zorder=0
        )
    for point in points:
        interval = point.interval or (point.value, point.value)
        bars = [[max(0.0, point.value - interval[0])], [max(0.0, interval[1] - point.value)]]
        axes.errorbar(
            point.size,
            point.value,
            yerr=bars,
            fmt=MARKERS[COLOURS.index(point.colour)],
            color=point.colour,
            markersize=7,
            capsize=3,
            linewidth=1,
            label=point.label,
        )
    axes.set_xlim(0, 1.1 * max(point.size for point in points))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value).replace(".0 ", " "))
    axes.set_xlabel("weights on disk")
    axes.set_ylabel(title)
    legend(figure, 2)


def _draw_drifts(figure: Any, lines: Mapping[str, tuple[int, Sequence[Mapping[str, Any]]]]) -> None:
    axes = figure.add_subplot()
    style(axes)
    for label, (index, blocks) in lines.items():
        axes.plot(
            [block["index"] for block in blocks],
            [100 * block["error"] for block in blocks],
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % 8],
            markersize=4,
            linewidth=1.2,
            label=label,
        )
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("drift of the hidden state, %")
    legend(figure, 2)


def _draw_divergence(figure: Any, blocks: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.add_subplot()
    style(axes)
    indices = [block["index"] for block in blocks]
    axes.bar(indices, [100 * block["own"] for block in blocks], color=COLOURS[1], width=0.6, label="by the block alone")
    axes.plot(
        indices,
        [100 * block["error"] for block in blocks],
        marker="o",
        markersize=4,
        linewidth=1.4,
        color=COLOURS[0],
        label="after the block",
    )
    axes.set_ylim(0, 110 * max(max(block["error"], block["own"]) for block in blocks) or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("drift of the hidden state, %")
    legend(figure, 2)


def _errors_by_kind(tensors: Any) -> Mapping[str, list[tuple[int, float]]]:
    """Kind of tensor (its name after the layer's index) → (layer, relative error) in order."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in tensors:
        match = _LAYER.fullmatch(record["name"])
        if record["status"] == "quantized" and record["error"] is not None and match is not None:
            series[match[2].rpartition(".")[2]].append((int(match[1]), record["error"]))
    return {kind: sorted(points) for kind, points in series.items()}


def _draw_errors(figure: Any, series: Mapping[str, list[tuple[int, float]]]) -> None:
    axes = figure.add_subplot()
    style(axes)
    for index, (kind, points) in enumerate(series.items()):
        layers, errors = zip(*points, strict=True)
        axes.plot(
            layers,
            [100 * error for error in errors],
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=4,
            linewidth=1.2,
            label=kind,
        )
    axes.set_ylim(0, 110 * max(error for points in series.values() for _, error in points))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative weight error, %")
    legend(figure, 4)
