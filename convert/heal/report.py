"""Sections of the report on healing: the losses by step."""

from __future__ import annotations

from llmconvert.report.section import Section
from llmconvert.report.steps import HealReport
from llmconvert.training.report import loss_plot

__all__ = ["healing_sections"]

_WHERE = {
    "attention": "in attention's weights",
    "all": "in all weights",
    "lora": "in adapters of the linears, which are merged,",
}


def healing_sections(report: HealReport) -> list[Section]:
    """The losses of healing over its steps."""
    text = (
        f"{report.steps:,} of {report.asked:,} steps on {report.tokens:,} tokens; {report.trained:,} numbers "
        f"{_WHERE[report.train or 'attention']} were trained, those of step {report.best_step:,} are kept."
    )
    plot = loss_plot(report, "Divergence of the predictions from the original's while healing.")
    return [Section(name="healing", title="Healing", text=text, plot=plot)]
