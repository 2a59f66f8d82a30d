"""The picture beside "which one" of docs/methods.md: size against divergence, from a page of measurements.

    python bench/choice_plot.py bench/results/2026-11-30-quality-epyc.md docs/which-method.png

Points are the rows of the page's table that are this package's own. A page that is taken anew is drawn by the same
command.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.validate.render.drawing import COLOURS, INK, render, style

__all__ = ["Row", "draw_choice", "own_rows"]

_ROW = re.compile(
    r"^\| *([\w.-]+)((?:\([^)]*\))?):([^|]+?) *\| *([\d.]+) MB \|[^|]*\|[^|]*\| *\**([\d.]+)\** *\|[^|]*\|$",
    re.MULTILINE,
)
#: Which colour a method has; what is not among them is another tool's.
_METHODS = ("rtn", "hqq", "gptq", "awq", "gptaq", "signround", "smoothquant")
_INCHES = (7.6, 4.6)
_CLOSE = 0.12


@dataclass(frozen=True, slots=True)
class Row:
    """A measured artifact: method, its options and scheme, size in MB, mean KL divergence in nats."""

    method: str
    label: str
    megabytes: float
    divergence: float


def own_rows(page: str) -> list[Row]:
    """The rows of methods that the package has.

    Raises:
        ValueError: there are none.
    """
    found = [
        Row(method, f"{method}{options} {scheme}", float(size), float(divergence))
        for method, options, scheme, size, divergence in _ROW.findall(page)
        if method in _METHODS
    ]
    if not found:
        raise ValueError("the page has no row of this package's methods")
    return found


def draw_choice(rows: Sequence[Row]) -> bytes:
    """A PNG: weights on disk against divergence on a logarithmic scale; lower and further left is better."""
    return render(lambda figure: _draw(figure, rows), "png", "which method")


def _draw(figure: Any, rows: Sequence[Row]) -> None:
    figure.set_size_inches(*_INCHES)
    axes = figure.add_subplot()
    style(axes)
    axes.set_yscale("log")
    for row in rows:
        colour = COLOURS[_METHODS.index(row.method)]
        axes.scatter([row.megabytes], [row.divergence], s=26, color=colour, zorder=3)
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel("KL divergence from the original, nats (log)")
    left, right = axes.get_xlim()
    width = right - left
    axes.set_xlim(left - 0.36 * width, right + 0.68 * width)
    smallest = min(row.megabytes for row in rows)
    heights: list[float] = []
    for row in sorted(rows, key=lambda row: row.divergence):
        # Names of the smallest stand to the left of them, where nothing else is.
        on_the_left, height = row.megabytes < smallest + 0.05 * width, row.divergence
        while not on_the_left and any(abs(height / taken - 1) < _CLOSE for taken in heights):
            height *= 1.02
        heights += [] if on_the_left else [height]
        axes.annotate(
            row.label,
            (row.megabytes, row.divergence),
            xytext=(row.megabytes + (-0.02 if on_the_left else 0.02) * width, height),
            ha="right" if on_the_left else "left",
            va="center",
            fontsize=7,
            color=INK,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.write_bytes(draw_choice(own_rows(arguments.page.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
