"""How one recipe of several ended, as a value that passes between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert import errors
from llmconvert.errors import LlmconvertError
from llmconvert.recipes.runner import RunResult
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.sweep.expand import Sweep
from llmconvert.recipes.sweep.result import SweepResult
from llmconvert.report.report import Report

__all__ = ["Outcome", "from_values", "outcomes_of_sweep", "to_values"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one recipe ended.

    Attributes:
        recipe: the file or name as given.
        result: what was made; None if it failed.
        failure: why it failed; None if it didn't.
        seconds: wall-clock time.
        sweep: what the variants of one recipe made together; None of a recipe by itself.
        log: file that holds what it said; None where it was said here.
        left_out: whether it is a variant that could not be, which is no failure of the others.
    """

    recipe: str
    result: RunResult | None
    failure: Exception | None
    seconds: float
    sweep: SweepResult | None = None
    log: Path | None = None
    left_out: bool = False

    @property
    def exit_code(self) -> int:
        """0, or what the failure ends a program with."""
        return 0 if self.failure is None or self.left_out else getattr(self.failure, "exit_code", 1)

    @property
    def error(self) -> str:
        """The failure in words; empty without one."""
        if self.failure is None or isinstance(self.failure, LlmconvertError | _ForeignError):
            return str(self.failure or "")
        return f"{type(self.failure).__name__}: {self.failure}"


class _ForeignError(Exception):
    """What a bug raised in another process; its text begins with its kind."""


def outcomes_of_sweep(recipe: str, swept: SweepResult, log: Path | None = None) -> list[Outcome]:
    """How each variant of a sweep ended."""
    left_out, outcomes = swept.left_out, []
    for name in (variant.name for variant in swept.sweep.variants):
        result, failure, seconds = swept.results.get(name), swept.failures.get(name), swept.seconds[name]
        outcomes.append(Outcome(f"{recipe}: {name}", result, failure, seconds, swept, log, name in left_out))
    return outcomes


def to_values(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The outcomes of one recipe, or of the variants of one, as JSON values."""
    swept = outcomes[0].sweep
    found: dict[str, Any] = {"ends": [_end(one) for one in outcomes]}
    if swept is not None:
        reports = {name: report.model_dump(mode="json") for name, report in swept.reports.items()}
        page = None if swept.page is None else str(swept.page)
        found["sweep"] = {"reports": reports, "picked": swept.picked, "page": page}
    return found


def _end(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": outcome.seconds}
    if outcome.result is not None:
        found["artifact"], found["published"] = str(outcome.result.artifact), outcome.result.published
        found["report"] = outcome.result.report.model_dump(mode="json")
    if outcome.failure is not None:
        found["failure"] = [type(outcome.failure).__name__, outcome.error]
    return found


def from_values(values: Mapping[str, Any], recipe: str, loaded: Recipe | Sweep, log: Path | None) -> list[Outcome]:
    """What :func:`to_values` gave, of the recipe that was read here.

    Args:
        recipe: the file or name as given.
        loaded: what stands in it.
    """
    ends = values["ends"]
    if isinstance(loaded, Recipe):
        (end,) = ends
        return [Outcome(recipe, _result(end, loaded), _failure(end), end["seconds"], log=log)]
    named = dict(zip([variant.name for variant in loaded.variants], ends, strict=True))
    made = {variant.name: variant.recipe for variant in loaded.variants if variant.recipe is not None}
    results = {name: _result(named[name], one) for name, one in made.items()}
    failures = {name: _failure(end) for name, end in named.items()}
    common = values["sweep"]
    swept = SweepResult(
        loaded,
        {name: result for name, result in results.items() if result is not None},
        {name: failure for name, failure in failures.items() if failure is not None},
        {name: Report.model_validate(report) for name, report in common["reports"].items()},
        {name: end["seconds"] for name, end in named.items()},
        common["picked"],
        None if common["page"] is None else Path(common["page"]),
    )
    return outcomes_of_sweep(recipe, swept, log)


def _result(end: Mapping[str, Any], recipe: Recipe) -> RunResult | None:
    if "artifact" not in end:
        return None
    return RunResult(recipe, Report.model_validate(end["report"]), Path(end["artifact"]), end["published"])


def _failure(end: Mapping[str, Any]) -> Exception | None:
    if "failure" not in end:
        return None
    kind, text = end["failure"]
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, LlmconvertError):
        return own(text)
    return _ForeignError(text)
