"""Sections of the report on healing: the losses by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmconvert.report.section import Plot, Section, Series
from llmconvert.report.steps import HealReport

__all__ = ["healing_sections"]

# A plot of more points than pixels shows nothing more.
_POINTS = 400


def healing_sections(report: HealReport) -> list[Section]:
    """The losses of healing over its steps."""
    step = max(1, -(-len(report.history) // _POINTS))
    lessons = _smooth(report.history, step)
    series = [Series(label="text it learns from", x=lessons[0], y=lessons[1])]
    if report.held_out:
        looks = tuple(float(entry["step"]) for entry in report.held_out)
        series.append(Series(label="held-out text", x=looks, y=tuple(entry["kl"] for entry in report.held_out)))
    text = (
        f"{report.steps:,} of {report.asked:,} steps on {report.tokens:,} tokens; {report.trained:,} numbers in "
        f"attention's weights were trained, those of step {report.best_step:,} are kept."
    )
    plot = Plot(
        caption="Divergence of the predictions from the original's while healing.",
        x_label="step",
        y_label="KL divergence per token, nats",
        series=tuple(series),
    )
    return [Section(name="healing", title="Healing", text=text, plot=plot)]


def _smooth(history: Sequence[Mapping[str, float]], step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Step numbers and divergences, means over ``step`` steps."""
    parts = [history[start : start + step] for start in range(0, len(history), step)]
    steps = tuple(float(part[-1]["step"]) for part in parts)
    return steps, tuple(sum(entry["kl"] for entry in part) / len(part) for part in parts)
