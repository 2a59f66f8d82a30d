"""What a sweep made, what could not be, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmconvert.errors import OutputError, UsageError
from llmconvert.recipes.runner import RunResult
from llmconvert.recipes.sweep.expand import Sweep
from llmconvert.report.report import Report

__all__ = ["SweepResult", "by_reason", "is_refusal"]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep made.

    Attributes:
        sweep: its variants.
        results: of those that were made and keep their limits, by name.
        failures: why the others are not there, or are not good enough, by name.
        reports: of all that were measured, by name.
        seconds: wall-clock time that each variant took by itself; what they shared is in the first one's.
        picked: the variant that the sweep's rule takes; None without a rule, or where none is good enough.
        page: all reports side by side; None if nothing was measured.
    """

    sweep: Sweep
    results: Mapping[str, RunResult]
    failures: Mapping[str, Exception]
    reports: Mapping[str, Report]
    seconds: Mapping[str, float]
    picked: str | None
    page: Path | None

    @property
    def left_out(self) -> Mapping[str, str]:
        """Reasons why variants could not be, by name; empty where nothing else was made either."""
        refused = {name: str(error) for name, error in self.failures.items() if is_refusal(error)}
        return {name: reason for name, reason in refused.items() if self.results and name not in self.reports}

    @property
    def left_out_lines(self) -> list[str]:
        """Every reason once, behind the names of the variants that it leaves out."""
        return by_reason(self.left_out)


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Every reason once, behind the names of the variants that have it."""
    alike = {why: [name for name, reason in reasons.items() if reason == why] for why in reasons.values()}
    return [f"{', '.join(names)}: {why}" for why, names in alike.items()]


def is_refusal(error: Exception) -> bool:
    """Whether a variant's settings do not go with the model or with one another, which no second try changes."""
    return isinstance(error, UsageError) and not isinstance(error, OutputError)
