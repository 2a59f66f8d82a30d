"""Which of several artifacts no other one beats in both size and quality, and where more bytes begin to gain little.

An artifact is on the front if none is both smaller and better. The knee of the front is the point farthest below the
line between its ends, sizes and costs each scaled to 0 … 1 (Satopää et al. 2011, "Finding a Kneedle in a Haystack").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmconvert.report.report import Check, Report

__all__ = ["Measure", "Point", "cost_of", "front", "knee", "measure_of", "points"]

#: By what artifacts are compared.
Measure = Literal["perplexity", "kl_mean"]

_SIZE = "size_bytes"


@dataclass(frozen=True, slots=True)
class Point:
    """An artifact's size in bytes, and its cost: a number that is the less the better."""

    name: str
    size: float
    cost: float


def measure_of(reports: Mapping[str, Report]) -> Measure:
    """What tells artifacts of one original apart with the least text: KL from it where all have it.

    Perplexities of few windows differ by chance in either direction. Those of several originals have nothing else.
    """
    originals = {(report.model.source, report.model.revision) for report in reports.values()}
    checks = [report.check("kl_mean") for report in reports.values()]
    known = all(check is not None and check.value is not None for check in checks)
    return "kl_mean" if known and len(originals) == 1 else "perplexity"


def points(reports: Mapping[str, Report], measure: str) -> list[Point]:
    """The artifacts of which size and quality were measured, in order."""
    found = []
    for name, report in reports.items():
        size, quality = report.check(_SIZE), report.check(measure)
        if size is not None and size.value is not None and quality is not None and quality.value is not None:
            found.append(Point(name, size.value, cost_of(quality)))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both size and cost, by size."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda one: (one.size, one.cost)):
        if not kept or point.cost < kept[-1].cost:
            kept.append(point)
    return kept


def knee(found: Sequence[Point]) -> Point | None:
    """The knee of the points' front; None where it has fewer than three."""
    line = front(found)
    if len(line) < 3:
        return None
    first, last = line[0], line[-1]

    def below(point: Point) -> float:
        along = (point.size - first.size) / (last.size - first.size)
        down = (first.cost - point.cost) / (first.cost - last.cost)
        return down - along

    best = max(line[1:-1], key=below)
    return best if below(best) > 0 else None


def cost_of(check: Check) -> float:
    """A measured check's value, turned so that less is better."""
    assert check.value is not None
    if check.unit == "share":
        return 1 - check.value
    return -check.value if check.unit == "tokens/s" else check.value
