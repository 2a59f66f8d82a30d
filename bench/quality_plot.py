"""The picture of ``bench/quality.py``: size against perplexity, ours and peers, one panel per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmconvert.validate.render.drawing import COLOURS, INK, legend, render, style

__all__ = ["draw_quality"]

_INCHES = (6.4, 4.6)
_OURS, _PEER, _ORIGINAL = COLOURS[0], COLOURS[1], COLOURS[8]
# Labels keep this distance, as a share of the panel's height.
_LINE = 0.038
# What is this much worse than the best tells nothing and squeezes the rest.
_TALLEST = 2.0


def draw_quality(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG. A model's first result is the original; the rest are points, those of peers in another colour."""
    return render(lambda figure: _draw(figure, tables), "png", "quality")


def _draw(figure: Any, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    figure.set_size_inches(_INCHES[0] * len(tables), _INCHES[1])
    for index, (name, results) in enumerate(tables.items()):
        axes = figure.add_subplot(1, len(tables), index + 1)
        style(axes)
        _panel(axes, results, labelled=index == 0)
        axes.set_title(name, color=INK, fontsize=10, loc="left")
    legend(figure, 3)


def _panel(axes: Any, results: Sequence[Mapping[str, Any]], *, labelled: bool) -> None:
    original, *points = results
    shown = [point for point in points if point["perplexity"] <= _TALLEST * original["perplexity"]]
    axes.axhline(
        original["perplexity"],
        color=_ORIGINAL,
        linestyle="--",
        linewidth=1,
        label=f"unquantized ({original['nbytes'] / 1e6:,.0f} MB)" if labelled else None,
    )
    for peer, colour, marker, label in ((False, _OURS, "o", "llmconvert"), (True, _PEER, "s", "others")):
        own = [point for point in shown if point["peer"] == peer]
        axes.scatter(
            [point["nbytes"] / 1e6 for point in own],
            [point["perplexity"] for point in own],
            s=22,
            color=colour,
            marker=marker,
            label=label if labelled else None,
            zorder=3,
        )
    axes.margins(0.1, 0.08)
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel("perplexity, lower is better")
    left, right = axes.get_xlim()
    # Room for the labels to the right of the points.
    axes.set_xlim(left, right + 0.3 * (right - left))
    _label(axes, shown, original["perplexity"])
    left_out = len(points) - len(shown)
    if left_out:
        axes.text(
            0.99, 0.98, f"{left_out} above", transform=axes.transAxes, ha="right", va="top", fontsize=7, color=INK
        )


def _label(axes: Any, points: Sequence[Mapping[str, Any]], level: float) -> None:
    """Names beside the points, off the line at ``level``; those of points above each other keep apart."""
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    line, width = _LINE * (top - bottom), right - left
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point["perplexity"]):
        x, y = point["nbytes"] / 1e6, point["perplexity"]
        # Names of points that stand close to each other begin at the same place, right of them all.
        edge = max(other["nbytes"] / 1e6 for other in points if abs(other["nbytes"] / 1e6 - x) < 0.05 * width)
        height = y
        while abs(height - level) < line / 2 or any(
            abs(x - other) < 0.3 * width and abs(height - taken) < line for other, taken in placed
        ):
            height += line / 8
        placed.append((x, height))
        axes.annotate(
            point["name"],
            (x, y),
            xytext=(edge + 0.03 * width, height),
            va="center",
            fontsize=6.5,
            color=_PEER if point["peer"] else _OURS,
            arrowprops={
                "arrowstyle": "-",
                "color": "#888888",
                "linewidth": 0.4,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
