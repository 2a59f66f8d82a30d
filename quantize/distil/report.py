"""Sections of the report on distillation: what was trained, and the losses by step."""

from __future__ import annotations

from llmconvert.report.section import Section
from llmconvert.report.steps import DistilReport
from llmconvert.training.report import loss_plot

__all__ = ["distillation_sections"]


def distillation_sections(report: DistilReport) -> list[Section]:
    """What was trained, and the losses over the steps."""
    norms = f"; {report.norms:,} norms were trained and are not the original's" if report.norms else ""
    streamed = ", one block in memory at a time" if report.streamed else ""
    text = (
        f"{report.steps:,} of {report.asked:,} steps on {report.tokens:,} tokens against the original's predictions; "
        f"{report.trained:,} scales and weights of norms were trained, {report.moved:,} of {report.codes:,} codes moved"
        f"{norms}{streamed}. What step {report.best_step:,} came to is kept."
    )
    plot = loss_plot(report, "Divergence of the predictions from the original's while distilling.")
    return [Section(name="distillation", title="Distillation", text=text, plot=plot, shown=("card",))]
