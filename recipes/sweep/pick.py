"""Which variant of a sweep to take: the smallest that is good enough, or the best that is small enough."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

if TYPE_CHECKING:  # a rule is read before torch is loaded, which reports need
    from llmconvert.report.report import Check, Report

__all__ = ["Pick"]

_WORDS = re.compile(
    r"(?:(?P<smallest>smallest) within (?P<limit>[\d.]+(?:e-?\d+)?)(?P<percent>\s*%)?(?: of (?P<of>[\w.]+))?)"
    r"|(?:(?P<best>best) under (?P<size>[\d.]+\s*[a-zA-Z]+)(?: by (?P<by>[\w.]+))?)"
)
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
            return cls("smallest", match["of"] or ("perplexity" if share else "kl_mean"), limit, share, text)
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
            if check is not None and self._loss(check) <= self.limit:
                good.append(point)
        return min(good, key=lambda point: (point.size, point.cost)).name if good else None

    def _loss(self, check: Check) -> float:
        """How much worse a check is than the original, or than the best it can be."""
        from llmconvert.validate.render.pareto import cost_of

        cost = cost_of(check)
        if not self.relative:
            return cost
        if check.reference:
            before = cost_of(check.model_copy(update={"value": check.reference}))
            return (cost - before) / abs(before) if before else cost
        return cost
