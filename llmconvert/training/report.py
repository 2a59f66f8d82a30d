"""What a report shows of a training: its losses by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmconvert.report.section import Plot, Series
from llmconvert.report.steps import HealReport

__all__ = ["loss_plot"]

# A plot of more points than pixels shows nothing more.
_POINTS = 400


def loss_plot(report: HealReport, caption: str) -> Plot:
    """The divergence from the original's predictions by step, on the text learned from and on what was held out."""
    step = max(1, -(-len(report.history) // _POINTS))
    lessons = _smooth(report.history, step)
    series = [Series(label="text it learns from", x=lessons[0], y=lessons[1])]
    if report.held_out:
        looks = tuple(float(entry["step"]) for entry in report.held_out)
        series.append(Series(label="held-out text", x=looks, y=tuple(entry["kl"] for entry in report.held_out)))
    return Plot(caption=caption, x_label="step", y_label="KL divergence per token, nats", series=tuple(series))


def _smooth(history: Sequence[Mapping[str, float]], step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Step numbers and divergences, means over ``step`` steps."""
    parts = [history[start : start + step] for start in range(0, len(history), step)]
    steps = tuple(float(part[-1]["step"]) for part in parts)
    return steps, tuple(sum(entry["kl"] for entry in part) / len(part) for part in parts)
