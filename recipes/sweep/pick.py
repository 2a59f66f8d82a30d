"""Which variant of a sweep to take: the smallest that is good enough, or the best that is small enough."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from llmconvert.errors import RecipeError

if TYPE_CHECKING:  # a rule is read before torch is loaded, which reports need
    from llmconvert.recipes.schema.recipe import Recipe
    from llmconvert.report.report import Check, Report

__all__ = ["Pick"]

_WORDS = re.compile(
    r"(?:(?P<smallest>smallest) within (?P<limit>[\d.]+(?:e-?\d+)?)(?P<percent>\s*%)?(?: of (?P<of>[\w.]+))?)"
    r"|(?:(?P<best>best) under (?P<size>[\d.]+\s*[a-zA-Z]+)(?: by (?P<by>[\w.]+))?)"
)
# What the first words of measurements' names need to be measured; and those that have names of their own.
_SECTIONS = {
    "perplexity": "perplexity",
    **dict.fromkeys(("kl_mean", "kl_p99", "kl_p999", "top1_agreement", "block_divergence"), "perplexity"),
    "generation": "generation",
    "task": "tasks",
    "positions": "positions",
    "serve": "serve",
}
_FAMILIES = ("task", "attention", "positions", "kv_cache", "memory", "serve", "fidelity")
_DIFFERENCES = ("kl_mean", "kl_p99", "kl_p999", "block_divergence")
_USAGE = "expected smallest within 2%, smallest within 0.05 of kl_mean, or best under 4GB"


@dataclass(frozen=True, slots=True)
class Pick:
    """A rule.

    Attributes:
        want: the smallest within a limit of quality, or the best within one of size.
        measure: what quality is: a check of the report.
        limit: of the measure, or of bytes.
        relative: whether the limit is a share of the original's value.
        text: the rule as it was written.
    """

    want: Literal["smallest", "best"]
    measure: str
    limit: float
    relative: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> Pick:
        """Read a rule.

        Raises:
            ValueError: it is none.
        """
        match = _WORDS.fullmatch(" ".join(text.split()))
        if match is None:
            raise ValueError(f"{text!r} is not understood; {_USAGE}")
        if match["smallest"]:
            share = match["percent"] is not None
            try:
                limit = float(match["limit"]) / (100 if share else 1)
            except ValueError:
                raise ValueError(f"{match['limit']!r} is no number; {_USAGE}") from None
            measure = match["of"] or ("perplexity" if share else "kl_mean")
            if share and measure in _DIFFERENCES:
                raise ValueError(
                    f"{text!r}: {measure} is itself a difference from the original, which has none to take "
                    f"{match['limit']}% of; give a number, for example smallest within 0.05 of {measure}"
                )
            return cls("smallest", measure, limit, share, text)
        try:
            size = TypeAdapter(ByteSize).validate_python(match["size"])
        except ValidationError:
            raise ValueError(f"{match['size']!r} is no size; {_USAGE}") from None
        return cls("best", match["by"] or "kl_mean", float(size), False, text)

    def choose(self, reports: Mapping[str, Report]) -> str | None:
        """The name of the variant that the rule takes; None if none is good or small enough."""
        from llmconvert.validate.render.pareto import points

        found = points(reports, self.measure)
        if self.want == "best":
            small = [point for point in found if point.size <= self.limit]
            return min(small, key=lambda point: (point.cost, point.size)).name if small else None
        good = []
        for point in found:
            check = reports[point.name].check(self.measure)
            loss = self._loss(check) if check is not None else None
            if loss is not None and loss <= self.limit:
                good.append(point)
        return min(good, key=lambda point: (point.size, point.cost)).name if good else None

    def _loss(self, check: Check) -> float | None:
        """How much worse a check is than the original, or than the best it can be; None where neither is known."""
        from llmconvert.validate.render.pareto import cost_of

        cost = cost_of(check)
        if check.reference is not None:
            lost = cost - cost_of(check.model_copy(update={"value": check.reference}))
            if not self.relative:
                return lost
            return lost / abs(check.reference) if check.reference else None
        known = check.unit == "share" or (not self.relative and check.unit != "tokens/s")
        return cost if known else None

    def require_measured(self, recipes: Sequence[Recipe]) -> None:
        """Refuse, before the work, a rule that asks for what none of the variants' recipes measure.

        Raises:
            RecipeError: there is no such number, or the section that gives it is missing.
        """
        from llmconvert.validate.render.display import known_names

        kind = self.measure.partition(".")[0]
        names = known_names()
        if self.measure not in names and kind not in _FAMILIES:
            close = difflib.get_close_matches(self.measure, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names))}"
            raise RecipeError(f"pick: {self.text}: reports have no number called {self.measure!r}{hint}")
        section = _SECTIONS.get(kind)
        settings = [recipe.validation for recipe in recipes]
        if section is not None and not any(one is not None and getattr(one, section) for one in settings):
            raise RecipeError(
                f"pick: {self.text}: needs {self.measure}, which no variant measures; give validate.{section}"
            )
